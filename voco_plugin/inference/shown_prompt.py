"""Logits processors and stopping criteria on placed blocks see the prompt that the caller gave.

Transformers calls them with the ids that ``generate`` counts. Over placed blocks these are the prompt's text
alone (or, with a head start, text and fillers): words on both sides of an image would be an n-gram, lengths
would be others, and a repetition penalty, which takes padding from the mask of all slots, would leave out the
first words of a shorter prompt. So each gets the ids of the caller's prompt in their place, as in one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class Prompt:
    """What the caller gave, in the place of the first ``length`` ids that ``generate`` counts.

    Args:
        ids: ``(B, N)``; rows of a call are these, each repeated for its beams or samples.
        mask: ``(B, N)``, its attention mask.
        length: ids of the prompt as ``generate`` counts them.
    """

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, length: int) -> None:
        self.ids, self.mask, self.length = ids, mask, length

    def before(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids`` ``(B · beams, length + new)`` as the caller would count them."""
        new = input_ids[:, self.length :]
        return torch.cat([self._for_rows(self.ids, len(new)).to(new.device), new], dim=1)

    def mask_for(self, rows: int) -> torch.Tensor:
        return self._for_rows(self.mask, rows)

    @staticmethod
    def _for_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
        return value.repeat_interleave(rows // value.shape[0], dim=0)


class PromptedProcessors(LogitsProcessorList):
    """The caller's logits processors; :meth:`built` adds those of the generation settings."""

    def __init__(self, processors: Iterable[Any], prompt: Prompt) -> None:
        super().__init__(processors)
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().__call__(self.prompt.before(input_ids), scores, **kwargs)  # type: ignore[arg-type]

    def built(self, build: Callable[..., Any], config: Any, values: dict[str, Any]) -> PromptedProcessors:
        """All of them, as ``build`` (transformers' ``_get_logits_processor``) makes them for the caller's
        prompt.

        Args:
            config: the generation config; its lengths count the prompt as ``generate`` does.
            values: the other arguments of ``build``, by name.
        """
        config = copy.copy(config)
        more = self.prompt.ids.shape[1] - self.prompt.length
        for name in ("min_length", "max_length"):
            if getattr(config, name, None):
                setattr(config, name, max(getattr(config, name) + more, 0))
        values = {**values, "logits_processor": LogitsProcessorList(self)}
        values["input_ids_seq_length"] = self.prompt.ids.shape[1]
        values["encoder_input_ids"] = self.prompt.ids
        model_kwargs = dict(values.get("model_kwargs") or {})
        if model_kwargs.get("attention_mask") is not None:
            model_kwargs["attention_mask"] = self.prompt.mask_for(len(model_kwargs["attention_mask"]))
        values["model_kwargs"] = model_kwargs
        return PromptedProcessors(build(config, **values), self.prompt)


class _Prompted(StoppingCriteria):
    def __init__(self, criterion: Any, prompt: Prompt) -> None:
        self.criterion, self.prompt = criterion, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.criterion(self.prompt.before(input_ids), scores, **kwargs)


def show_prompt(kwargs: dict[str, Any], prompt: Prompt) -> None:
    """Give the caller's processors and criteria among the arguments of ``generate`` their prompt."""
    kwargs["logits_processor"] = PromptedProcessors(kwargs.get("logits_processor") or (), prompt)
    given = kwargs.get("stopping_criteria") or ()
    kwargs["stopping_criteria"] = StoppingCriteriaList(_Prompted(one, prompt) for one in given)
