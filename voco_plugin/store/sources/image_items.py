"""Images of a source, one by one: what each is called, and how it is opened when its turn comes."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.images import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from ...data.images import URL as URL
from ...data.images import inline_bytes


@dataclass(frozen=True)
class ImageItem:
    """One image of a source.

    Attributes:
        name: what it is called in the source; unique within it.
        read: gives what :func:`voco_plugin.data.images.open_image` takes: a path, bytes, a record, a PIL
            image.
        stamp: changes when the image behind the name may have changed (size and time of a file, fingerprint
            of a dataset); ``None`` where nothing cheap can tell.
        series: the name of the video that it is a frame of.
        time: seconds within that video.
    """

    name: str
    read: Callable[[], Any]
    stamp: str | None = None
    series: str | None = None
    time: float | None = None

    def open(self) -> Any:
        """The image as 8-bit RGB.

        Raises:
            BadImageError: it is missing, broken or not an image; the message names it.
        """
        from ...data.images import BadImageError, open_image

        try:
            found = self.read()
        except BadImageError:
            raise
        except (OSError, ValueError) as problem:
            raise BadImageError(f"{self.name}: image cannot be read: {problem}.") from None
        return open_image(found, None if isinstance(found, (str, os.PathLike)) else self.name)


class ImageSource:
    """Images in order. ``len`` and ``[i]`` work where ``random_access`` says so; iteration always does."""

    random_access = True
    sampling = ""
    """How the frames of its videos were chosen, in words."""

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        raise TypeError(f"a {type(self).__name__} does not know its length before it is read")

    def __getitem__(self, index: int) -> ImageItem:
        raise TypeError(f"a {type(self).__name__} is read in order")

    def share(self, rank: int, world: int) -> Iterator[ImageItem]:
        """Every ``world``-th image, from number ``rank`` on: what one of ``world`` processes takes."""
        if self.random_access:
            return (self[i] for i in range(rank, len(self), world))
        return itertools.islice(iter(self), rank, None, world)

    def share_length(self, rank: int, world: int) -> int | None:
        """How many images :meth:`share` gives; ``None`` where only reading would tell."""
        return len(range(rank, len(self), world)) if self.random_access else None

    def about(self, rank: int, world: int) -> int | None:
        """About how many :meth:`share` gives, for a progress bar; ``None`` where nothing tells."""
        return self.share_length(rank, world)


class FileImages(ImageSource):
    """Image files (or URLs); a name that comes twice is one image.

    Args:
        inline: of the names, those whose images are written out in a JSON file, with what stands there.
    """

    def __init__(self, paths: Iterable[str], inline: Mapping[str, str] | None = None) -> None:
        self.paths = list(dict.fromkeys(paths))
        self.inline = dict(inline or {})

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        path = self.paths[index]
        text = self.inline.get(path)
        if text is None:
            return ImageItem(path, lambda: path, file_stamp(path))
        return ImageItem(path, lambda: _written_out(text), hashlib.sha256(text.encode()).hexdigest())


def _written_out(text: str) -> bytes:
    data = inline_bytes(text)
    assert data is not None
    return data


class JoinedImages(ImageSource):
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = list(sources)
        self.random_access = all(source.random_access for source in sources)
        self.ends = list(itertools.accumulate(map(len, sources))) if self.random_access else []

    def __iter__(self) -> Iterator[ImageItem]:
        return itertools.chain.from_iterable(self.sources)

    def __len__(self) -> int:
        return (self.ends or [0])[-1] if self.random_access else super().__len__()

    def __getitem__(self, index: int) -> ImageItem:
        if not self.random_access:
            return super().__getitem__(index)
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is outside the {len(self)} of this source.")
        number = bisect.bisect_right(self.ends, index)
        return self.sources[number][index - (self.ends[number - 1] if number else 0)]


class PickedImages(ImageSource):
    """Some images of a source with random access, by their numbers."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> ImageItem:
        return self.source[self.numbers[index]]


def file_stamp(path: str) -> str | None:
    """Size in bytes and time of change in nanoseconds of a local file; ``None`` where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return f"{found.st_size}-{found.st_mtime_ns}"
