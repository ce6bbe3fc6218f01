"""A generation that runs in a thread of its own: its text comes piece by piece, and it ends when it is left.

    stream = TokenStream(tokenizer, lambda **options: model.generate(**inputs, **options))
    for text in stream: ...            # the answer so far
    stream.first_token_seconds, stream.seconds, stream.result

Who stops iterating (a closed page, an interrupt) stops the generation after the token it is at; the thread
has ended when the iterator is closed. What generation raises is raised to who iterates.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class _Left(StoppingCriteria):
    """Ends every row once nobody waits for the answer."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class _Timed(TextIteratorStreamer):
    """Notes when the first token came; its text may come later, with the end of a word."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.calls = 0
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call is the prompt's
            self.first = time.perf_counter()
        super().put(value)


class TokenStream:
    """The text of one generation, as it grows.

    Args:
        tokenizer: of the model that answers.
        generate: called in a thread with ``streamer`` and ``stopping_criteria``; what it returns is
            ``result``.

    Attributes:
        result: what ``generate`` returned; ``None`` before.
        first_token_seconds: from the start of the generation to its first token; ``None`` where none came.
        seconds: from its start to its end.
    """

    def __init__(self, tokenizer: Any, generate: Callable[..., Any]) -> None:
        self.tokenizer, self.generate = tokenizer, generate
        self.result: Any = None
        self.first_token_seconds: float | None = None
        self.seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        left, problem = threading.Event(), []
        streamer = _Timed(self.tokenizer)
        start = time.perf_counter()

        def work() -> None:
            try:
                self.result = self.generate(
                    streamer=streamer, stopping_criteria=StoppingCriteriaList([_Left(left)])
                )
            except BaseException as caught:
                problem.append(caught)
            finally:
                self.seconds = time.perf_counter() - start
                streamer.end()

        thread = threading.Thread(target=work, name="voco-answer", daemon=True)
        thread.start()
        text = ""
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield text.strip()
        finally:
            left.set()
            thread.join()
            if streamer.first is not None:
                self.first_token_seconds = streamer.first - start
        if problem:
            raise problem[0]


__all__ = ["TokenStream"]
