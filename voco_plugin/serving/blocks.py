"""Where a server's blocks come from: kept ones by key, new ones out of stage 1, batched over who waits."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..cache import VoCoCache


class UnknownKeyError(KeyError):
    """No image is kept under this key."""

    def __str__(self) -> str:
        return str(self.args[0])


class Compressed(NamedTuple):
    """One image or video, compressed.

    Attributes:
        key: 64 hex digits, by which later requests may name it.
        cache: its blocks in order, a cache of one row (an image has one, a video one a frame or segment).
        keys: the store's key of each block; of an image, ``(key,)``.
        times: per block the text that stands before it, or ``None``; ``None`` for an image.
        hit: whether it was kept, and not compressed now.
        seconds: what getting it took, waiting included.
    """

    key: str
    cache: VoCoCache
    keys: tuple[str, ...]
    times: tuple[str | None, ...] | None
    hit: bool
    seconds: float


class Blocks(abc.ABC):
    """Compressed images for one model, in an event loop.

    Attributes:
        num_tokens: K where a request names none.
    """

    num_tokens: int

    @abc.abstractmethod
    async def of_image(self, image: Any, num_tokens: int | None = None) -> Compressed:
        """A PIL image's block: kept, or compressed together with whatever else waits.

        Raises:
            ValueError: the model cannot give this K.
            BadImageError: the image processor does not take it.
        """

    @abc.abstractmethod
    async def of_video(self, frames: Sequence[Any], num_tokens: int | None = None) -> Compressed:
        """The blocks of a video's frames (:class:`~voco_plugin.video.frames.Frame`)."""

    @abc.abstractmethod
    async def of_key(self, key: str) -> Compressed:
        """What is kept under ``key``.

        Raises:
            UnknownKeyError: nothing is; a store may have dropped it.
            ValueError: ``key`` is not 64 hex digits.
        """

    @abc.abstractmethod
    def start(self) -> None:
        """Ready once it returns."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Fail what waits, and end."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """``{"waiting": images, "hits": n, "misses": n, "compressed_seconds": s, "kept_bytes": n}``."""


__all__ = ["Blocks", "Compressed", "UnknownKeyError"]
