"""One batch's lesson: the teacher reads its prompts, and the student is compared with it, inside the
student's own forward.

    batch ──> Lesson: the same prompts without VoCo tokens
    model(**batch, training_step=lesson)      through DDP, DeepSpeed or FSDP, as any forward
      └─ the student's forward: the teacher reads (no graph) ──> TRL's fused loss, the backbone's output seen
         on its way ──> divergence of both hidden states through both heads

Inside, because there the wrappers hold their weights together; the teacher first, because its pass must leave
nothing between the student's forward and backward.

Shapes: ``B`` rows of ``N`` tokens, ``n`` answer tokens in all of them, ``d`` width.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from ...core.attachment import evaluating
from ...core.block_embeddings import QUESTION_MASK
from ...core.forward import UNTOUCHED, ForwardMode
from ...core.injection import remove_voco_tokens
from ...core.layout import TokenVocabulary
from ...core.packed_rows import DOCUMENT_IDS, Documents
from ..fused_step import FusedStep
from .config import DistillConfig
from .divergence import Comparison, Head, divergence
from .teacher import Teacher

logger = logging.getLogger(__name__)

_PER_TOKEN = {
    "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100,
}  # fmt: skip
"""What a batch holds of each token, and what stands for none."""
_STUDENTS = ("labels", "fused_lm_head", "output_router_logits", QUESTION_MASK, DOCUMENT_IDS)
"""What the student's forward is given and the plain model's is not."""


@dataclass
class DistilledOutput(FusedCausalLMOutput):
    """TRL's output and, summed over the answer tokens, the terms that the distillation adds."""

    divergence: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


# -- one batch
# ------------------------------------------------------------------------------------------------------------


def plain_prompts(
    batch: Mapping[str, Any], vocab: TokenVocabulary, keep_voco: bool = False
) -> dict[str, torch.Tensor]:
    """The per-token tensors of ``batch`` as the original model reads its prompts: one row a conversation,
    without VoCo tokens (unless ``keep_voco``) and block sinks. Answer tokens keep their order.
    """
    tokens = {name: batch[name] for name in _PER_TOKEN if batch.get(name) is not None}
    if batch.get(DOCUMENT_IDS) is not None:
        documents = Documents(batch[DOCUMENT_IDS], batch["input_ids"].shape)
        tokens = {name: documents.split(value, _PER_TOKEN[name]) for name, value in tokens.items()}
        tokens["attention_mask"] = documents.mask.long()
    if keep_voco:
        return tokens
    mask = tokens.get("attention_mask")
    left = mask is not None and bool((mask[:, 0] == 0).any())
    return remove_voco_tokens(tokens, vocab, pad_token_id=0, padding_side="left" if left else "right")


def before_answers(labels: torch.Tensor) -> torch.Tensor:
    """``(B, N)`` labels → ``(B, N - 1)`` bool: the positions that predict an answer token."""
    return labels[:, 1:] != -100


@dataclass
class Lesson:
    """What the forward of one batch needs for its distillation.

    Attributes:
        prompts: :func:`plain_prompts` of the batch.
        labels: ``(B, N)``, the student's.
    """

    distiller: Distiller
    prompts: dict[str, torch.Tensor]
    labels: torch.Tensor

    def run(self, student: Any, **kwargs: Any) -> DistilledOutput:
        """The student's fused forward with the terms of the distillation, as sums over its answer tokens."""
        how = self.distiller
        inputs = {k: v for k, v in kwargs.items() if k not in (*_STUDENTS, *_PER_TOKEN)}
        inputs |= {k: v for k, v in self.prompts.items() if k != "labels"}
        extra = {"output_hidden_states": True} if how.config.hidden_layers else {}
        if how.head is None:
            how.head = observe_head(student, how.vocab)
        taught, teacher = how.teacher.read({**inputs, **extra}, **how.head)
        seen: list[Any] = []
        output = how.step.run(student, **kwargs, **extra, voco_mode=ForwardMode(output=_kept_in(seen)))
        at, there = before_answers(self.labels), before_answers(self.prompts["labels"])
        if int(at.sum()) != int(there.sum()):
            raise ValueError(
                f"the student answers {int(at.sum())} tokens of this batch and the teacher "
                f"{int(there.sum())}: a row's first token, which nothing predicts, has a label; mask it."
            )
        device = output.log_probs.device
        terms: dict[str, torch.Tensor] = {}
        if how.config.weight:
            own = answers(seen[0].last_hidden_state, at, device)
            its = answers(taught.last_hidden_state, there, device)
            head = Head.of(student, **how.head)
            terms["divergence"] = divergence(own, head, its, teacher, how.comparison).sum()
        if how.config.hidden_weight:
            pairs = self._layers(seen[0], taught)
            errors = [hidden_error(answers(a, at, device), answers(b, there, device)) for a, b in pairs]
            terms["hidden"] = torch.stack(errors).mean()
        return DistilledOutput(**output, **terms)

    def _layers(self, own: Any, its: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers = self.distiller.config.hidden_layers
        if layers is None:
            return [(own.last_hidden_state, its.last_hidden_state)]
        found = [getattr(output, "hidden_states", None) or () for output in (own, its)]
        count = min(map(len, found))
        if max(layers) >= count:
            known = f"has hidden states 0 to {count - 1}" if count else "gives no hidden states"
            raise ValueError(
                f"distill.hidden_layers={layers}: {type(own).__name__} {known}; choose among them, or leave "
                "hidden_layers out for the last."
            )
        return [(found[0][n], found[1][n]) for n in layers]


def answers(states: torch.Tensor, mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``(B, N, d)`` at the positions that predict an answer token → ``(n, d)``."""
    return states[:, :-1][mask.to(states.device)].to(device)


def hidden_error(own: torch.Tensor, its: torch.Tensor) -> torch.Tensor:
    """The squared difference of ``(n, d)`` hidden states over the teacher's mean square, summed over n."""
    wide = torch.promote_types(own.dtype, torch.float32)
    own, its = own.to(wide), its.to(wide)
    return ((own - its).square().mean(-1) / its.square().mean(-1)).sum()


def observe_head(student: Any, vocab: TokenVocabulary) -> dict[str, bool]:
    """Which of its config's logit scale and soft cap the model itself applies, seen on a few tokens of text.

    A vision-language class does not always do what its text config says (transformers 5.23: Aya Vision and
    Cohere2 Vision leave the scale out, LLaVA around Gemma 2 the soft cap).

    Returns:
        keyword arguments of :meth:`Head.of`.

    Raises:
        ValueError: the model gets its logits in a way that is not known here.
    """
    ids = [i for i in range(64) if i not in {*vocab.placeholders, *vocab.markers, vocab.voco_id}][:4]
    given = torch.tensor([ids], device=student.get_input_embeddings().weight.device)
    seen: list[Any] = []
    mode = replace(UNTOUCHED, output=_kept_in(seen))
    with torch.no_grad(), evaluating(student):
        text = {"input_ids": given, "attention_mask": torch.ones_like(given)}
        own = type(student).forward(student, **text, use_cache=False, voco_mode=mode).logits[0]
        hidden = seen[0].last_hidden_state[0].to(own.device)
        exact = own.dtype in (torch.float32, torch.float64)
        tolerance = (1e-3 if exact else 3e-2) * float(own.abs().max())
        differences = []
        for scaled, capped in itertools.product((True, False), repeat=2):
            found = Head.of(student, scaled, capped).logits(hidden)
            differences.append(float((own - found).abs().max()))
            if differences[-1] <= tolerance:
                if len(differences) > 1:
                    logger.warning(
                        "%s does not apply the logit scale or soft cap of its text config, and TRL's loss "
                        "does: the divergence compares the model's own distributions.",
                        type(student).__name__,
                    )
                return {"scaled": scaled, "capped": capped}
    raise ValueError(
        f"{type(student).__name__} does more between its hidden states and its logits than a head, a scale "
        f"and a soft cap (logits differ by {min(differences):.3g}), so distill cannot read its distribution; "
        "leave distill out."
    )


def _kept_in(seen: list[Any]) -> Any:
    """A ``ForwardMode.output`` that keeps the backbone's output in ``seen`` and hands it on as it is."""

    def keep(output: Any) -> Any:
        seen.append(output)
        return output

    return keep


class Distiller:
    """A teacher and how its lessons are counted.

    Args:
        rows: rows of the student's own vocabulary before VoCo's were added; ``None``: all.
        step: the student's own, TRL's fused forward.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        vocab: TokenVocabulary,
        rows: int | None,
        step: FusedStep,
    ) -> None:
        self.config, self.teacher, self.vocab, self.step = config, teacher, vocab, step
        known = [n for n in (rows, teacher.rows) if n is not None]
        self.comparison = Comparison(
            config.divergence, config.temperature, min(known, default=None), (vocab.voco_id,), config.top_k,
            config.chunk,
        )  # fmt: skip
        self.head: dict[str, bool] | None = None

    def lesson(self, batch: Mapping[str, Any]) -> Lesson:
        return Lesson(self, plain_prompts(batch, self.vocab, self.config.teacher_tokens), batch["labels"])
