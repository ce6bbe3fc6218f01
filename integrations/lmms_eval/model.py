"""The classes that the harness makes: ``VoCoChat`` for generation, ``VoCoSimple`` (``--force_simple``) for
log-likelihood tasks too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from .arguments import ModelArgs, read_args
from .loading import load_reader
from .messages import Prompt, Videos, read_chat, read_simple
from .reading import Reader

_PASSED = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty")
_OF_OTHERS = ("image_aspect_ratio", "max_gen_toks", "interleave_visuals", "image_sizes")


class VoCoModel(lmms):
    """What both classes share.

    Args:
        pretrained, given: see :class:`~.arguments.ModelArgs`.
        reader: a model that is loaded already, in the place of all these; it stays when the harness clears.
    """

    def __init__(self, pretrained: Any = None, *, reader: Reader | None = None, **given: Any) -> None:
        super().__init__()
        self._stays = reader is not None
        if reader is None:
            self.args = read_args({"pretrained": pretrained, **given})
            reader = load_reader(self.args)
        else:
            self.args = ModelArgs(pretrained="", **given)
        # in a dictionary, out of sight of the harness, which deletes modules when it has its answers
        self._held = {"reader": reader}
        self._warned: set[str] = set()
        self.videos = Videos(self.args.num_frames, self.args.fps, self.args.time_text)
        self.keys_of: dict[tuple[str, int], tuple[str, ...]] = {}
        """(task, number of the question) → keys of its images: intervals draw whole images."""
        self.tick: Callable[[int], Any] | None = None

    @property
    def reader(self) -> Reader:
        return self._held["reader"]

    @property
    def device(self) -> Any:
        return next(self.reader.model.parameters()).device

    @property
    def batch_size(self) -> int:
        return self.reader.batch_size

    def clean(self) -> None:
        if not self._stays:
            reader = self._held.pop("reader")
            logger.info(f"voco: {reader.compressed} image(s) compressed for {reader.asked} prompt(s)")
            reader.close()
            super().clean()

    # -- requests

    def _doc(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _read(self, arguments: tuple) -> Prompt:
        """The prompt of a request.

        Raises:
            ValueError: its picture or video cannot be read; the message names the question.
        """
        task, number = _question(arguments)
        try:
            return self._prompt(arguments)
        except (OSError, SyntaxError) as problem:  # what PIL raises where the data set decodes it
            raise ValueError(f"{task} question {number} cannot be shown: {problem}") from problem

    def _prompt(self, arguments: tuple) -> Prompt:
        raise NotImplementedError

    def _options(self, arguments: tuple) -> dict[str, Any]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, those of one set of options together; each is cut where one of ``until`` begins."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(self._options(request.args), sort_keys=True), []).append(number)
        out = [""] * len(requests)
        with self._bar(len(requests)) as tick:
            for text, numbers in groups.items():
                options, until = self._read_options(json.loads(text))
                for start in range(0, len(numbers), self.batch_size):  # pictures of a batch at a time
                    part = numbers[start : start + self.batch_size]
                    prompts = [self._read(requests[n].args) for n in part]
                    said = self.reader.answer(prompts, tick, **options)
                    for n, prompt, answer in zip(part, prompts, said, strict=True):
                        out[n] = _cut(answer, until)
                        self.keys_of[_question(requests[n].args)] = prompt.keys
        return out

    def _read_options(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The harness's ``generation_kwargs`` as ``model.generate`` takes them, and ``until``."""
        given = dict(given)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [term for term in until if term]
        options: dict[str, Any] = {}
        options["max_new_tokens"] = int(given.pop("max_new_tokens", None) or self.args.max_new_tokens)
        temperature = float(given.pop("temperature", 0) or 0)
        sample = given.pop("do_sample", None)
        sample = temperature > 0 if sample is None else bool(sample) and temperature > 0
        if sample:
            options |= {"do_sample": True, "temperature": temperature}
        for name in _PASSED[1:]:
            value = given.pop(name, None)
            if value is not None and (sample or name not in ("top_p", "top_k")):
                options[name] = value
        for name in given:
            if name not in _OF_OTHERS and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"generation option {name!r} is not known to the model voco; left out.", stacklevel=2
                )
        return options, until

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            "the model voco does not run tasks of several rounds (generate_until_multi_round)."
        )

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError(
            "log-likelihood tasks need the simple class: add --force_simple to the command."
        )

    def _bar(self, total: int) -> _Bar:
        return _Bar(total, self.tick, self.rank)


class VoCoChat(VoCoModel):
    """Generation tasks, from the harness's messages."""

    is_simple = False

    def _options(self, arguments: tuple) -> dict[str, Any]:
        return arguments[2]

    def _prompt(self, arguments: tuple) -> Prompt:
        _, to_messages, _, number, task, split = arguments
        talk = to_messages(self._doc(task, split, number))
        return read_chat(talk, self.videos, f"{task} question {number}")


class VoCoSimple(VoCoModel):
    """Generation and log-likelihood tasks, from a context and its visuals."""

    is_simple = True

    def _options(self, arguments: tuple) -> dict[str, Any]:
        return arguments[1]

    def _prompt(self, arguments: tuple) -> Prompt:
        context, _, to_visual, number, task, split = arguments
        visuals = to_visual(self._doc(task, split, number))
        return read_simple(context, visuals, self.videos, f"{task} question {number}")

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Per request a number and whether its continuation is the greedy choice; a prompt is read once for
        all of its continuations. Each pair is wrapped: lmms-eval 0.7.3 writes a bare one as text, and then
        cannot count it (remove when it does not).

        Of multiple choice the number is the loss (minus the log-likelihood, in nats, summed over tokens): the
        harness takes the choice with the smallest. Where a task asks for the log-likelihood of its target it
        is that.

        Raises:
            ValueError: a request without an image function (acc_mutual_info, which the harness computes from
                losses as if they were likelihoods).
        """
        together: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            if len(request.args) != 6:
                raise ValueError(
                    "the model voco does not score acc_mutual_info; take it out of the task's metric_list."
                )
            context, _, _, doc, task, split = request.args
            together.setdefault((context, doc, task, split), []).append(number)
        out: list[Any] = [None] * len(requests)
        groups = list(together.values())
        with self._bar(len(requests)) as tick:
            for start in range(0, len(groups), self.batch_size):
                part = groups[start : start + self.batch_size]
                prompts = [self._read(requests[numbers[0]].args) for numbers in part]
                endings = [[self._ending(requests[n].args) for n in numbers] for numbers in part]
                for numbers, scored in zip(part, self.reader.likelihood(prompts, endings), strict=True):
                    for n, one in zip(numbers, scored, strict=True):
                        sign = -1 if isinstance(requests[n].args[1], str) else 1
                        pair = (sign * one.log_likelihood, one.is_greedy)
                        out[n] = GenerationResult(text=pair)  # type: ignore[arg-type]
                    tick(len(numbers))
        return out

    def _ending(self, arguments: tuple) -> str:
        _, target, _, number, task, split = arguments
        return target if isinstance(target, str) else str(target(self._doc(task, split, number)))


class _Bar:
    """A progress bar of the harness's kind, or the caller's."""

    def __init__(self, total: int, tick: Callable[[int], Any] | None, rank: int) -> None:
        self._tick = tick
        self._bar = (
            None if tick is not None else tqdm(total=total, disable=rank != 0, desc="Model Responding")
        )

    def __enter__(self) -> Callable[[int], Any]:
        return self._tick if self._bar is None else self._bar.update

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def _question(arguments: tuple) -> tuple[str, int]:
    return arguments[-2], arguments[-3]


def _cut(answer: str, until: list[str]) -> str:
    """``answer`` up to where one of ``until`` begins."""
    for term in until:
        answer = answer.split(term)[0]
    return answer.strip()
