"""What stands in for a row whose image cannot be read, or that the image processor refuses."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from ..data.images import BadImageError, describe, find_refused

logger = logging.getLogger(__name__)

DRAWS = 16
"""Rows drawn in the place of a bad one before the data set is taken to be bad itself."""


class NothingToLearn(ValueError):
    """Rows without a labelled token.

    Attributes:
        problems: number in the batch → what is said of it.
    """

    def __init__(self, problems: dict[int, str] | str) -> None:
        self.problems = problems if isinstance(problems, dict) else {}
        super().__init__(next(iter(problems.values())) if isinstance(problems, dict) else problems)


class ReplacesBadRows:
    """The part of :class:`~voco_plugin.VoCoDataCollator` that runs where a row is bad."""

    processor: Any
    dataset_text_field: str
    on_bad_sample: str
    seed: int
    pool: Any
    _named: set[str]
    _row: Callable[..., Any]

    def _refused(self, rows: list[dict[str, Any]], names: list[str]) -> dict[int, str]:
        """The rows with an image that the image processor does not take."""
        image_processor = getattr(self.processor, "image_processor", None)
        if image_processor is None:
            return {}
        refused = {}
        for number, row in enumerate(rows):
            found = find_refused(image_processor, row["images"])
            if found:
                which, reason = next(iter(found.items()))
                refused[number] = f"{names[number]}: image {which} cannot be used: {reason}."
        return refused

    def _replace(
        self,
        problems: dict[int, str],
        examples: list[Any],
        rows: list[Any],
        names: list[str],
        packed: list[int] | None = None,
        error: type[ValueError] = BadImageError,
    ) -> None:
        """Put another row where each of ``problems`` is, or raise. A packed row goes on without it, if it has
        others."""
        if problems and self.on_bad_sample == "raise":
            raise error(next(iter(problems.values())))
        good = [number for number in range(len(rows)) if number not in problems]
        kept = set() if packed is None else {packed[number] for number in good}
        out = []
        for number, problem in problems.items():
            if packed is not None and packed[number] in kept:
                out.append(number)
                if problem not in self._named:
                    self._named.add(problem)
                    logger.warning("%s Skipped; its packed row goes on without it.", problem)
                continue
            if packed is not None:
                kept.add(packed[number])
            rows[number], other = self._stand_in(
                examples[number], problem, [(rows[g], names[g]) for g in good], error
            )
            examples[number] = rows[number]  # should it be bad too, another is drawn
            if problem not in self._named:
                self._named.add(problem)
                logger.warning("%s Skipped; %s takes its place.", problem, other)
            names[number] = f"{other}, in the place of {names[number]},"
        for number in sorted(out, reverse=True):
            assert packed is not None  # only packed rows go on without one of theirs
            for parallel in (examples, rows, names, packed):
                del parallel[number]

    def _stand_in(
        self, example: Any, problem: str, good: list[tuple[dict, str]], error: type[ValueError]
    ) -> tuple[dict, str]:
        """A good row instead of ``example``, and its name; the draw depends on ``example`` and the seed."""
        identity = hashlib.blake2b(digest_size=16)
        _digest(example, identity)
        for attempt in range(DRAWS):
            key = identity.digest() + f"{self.seed}/{attempt}".encode()
            draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            if self.pool is None:
                if good:
                    row, name = good[draw % len(good)]
                    return dict(row), name
                break
            index = draw % len(self.pool)
            drawn = {key: value for key, value in self.pool[index].items() if key in example}
            name = f"row {index}" + (f" (id {drawn['id']!r})" if "id" in drawn else "")
            row = self._row(drawn, name, {}, 0)
            if row is not None and not self._refused([row], [name]):
                return row, name
        tried = f"{DRAWS} rows drawn" if self.pool is not None else "every other row of its batch"
        raise error(f"{problem} on_bad_sample=skip found no row in its place: {tried} are bad too.")


def _digest(value: Any, into: Any) -> None:
    """Feed what tells a row from others into a hash: text, numbers, file names and bytes; of an open image
    only what it is called, for its address in memory would differ between runs."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            into.update(f"{key}=".encode())
            _digest(value[key], into)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(item, into)
    elif isinstance(value, (bytes, bytearray)):
        into.update(value)
    elif isinstance(value, (str, int, float, bool, os.PathLike)) or value is None:
        into.update(f"{value}|".encode())
    else:
        into.update(
            describe(value).encode() if isinstance(value, Image.Image) else type(value).__name__.encode()
        )
