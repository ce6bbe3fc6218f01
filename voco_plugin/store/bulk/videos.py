"""The videos among the images of a run: which frames each has, kept beside their caches when the run ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..sources.image_items import ImageItem
from ..video_series import Series


class SeriesSeen:
    """Names and times of the frames that have come by, video by video; no picture is held."""

    def __init__(self) -> None:
        self._frames: dict[str, list[tuple[str, float]]] = {}

    def see(self, item: ImageItem) -> None:
        """Remember an image that is part of a video."""
        if item.series is not None:
            self._frames.setdefault(item.series, []).append((item.name, item.time or 0.0))

    def found(self, num_tokens: int, sampling: str, left_out: Sequence[dict[str, str]]) -> Iterator[Series]:
        """The series, without what was left out; a video of which nothing is left is none.

        Args:
            left_out: ``{"image", "reason"}`` of each.
        """
        why = {one["image"]: one["reason"] for one in left_out}
        for name, frames in self._frames.items():
            kept = [frame for frame in frames if frame[0] not in why]
            if kept:
                names, times = zip(*kept, strict=True)
                yield Series(name, num_tokens, names, times, sampling, why.get(name))
