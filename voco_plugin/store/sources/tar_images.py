"""Images inside tar files (WebDataset shards), read in place: nothing is unpacked.

A local uncompressed tar is indexed once by its headers (an image is then two numbers: where it begins, how
long it is); a compressed or remote one is read in order. Members that are not images by their suffix
(captions, labels) are skipped. A broken header ends the reading with an error, where ``tarfile`` by itself
would end it silently.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import Any

from .image_items import IMAGE_SUFFIXES, URL, ImageItem, ImageSource, file_stamp


class _StrictHeader(tarfile.TarInfo):
    """A member header that raises where it is broken."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictHeader:
        try:
            return super().fromtarfile(tar)  # type: ignore[return-value]
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as problem:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"its header at byte {tar.offset} is broken ({problem})") from None


class TarImages(ImageSource):
    """The images of one local, uncompressed tar, by their place in it."""

    def __init__(self, path: str) -> None:
        self.path, self.stamp = path, file_stamp(path)
        self.members: list[tuple[str, int, int]] = []
        try:
            with tarfile.open(path, "r:", tarinfo=_StrictHeader) as tar:
                for member in tar:
                    if _is_image(member):
                        self.members.append((member.name, member.offset_data, member.size))
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist.") from None
        except tarfile.TarError as problem:
            raise ValueError(f"{path} is no tar file that can be read to its end: {problem}.") from None
        if not self.members:
            raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> ImageItem:
        name, offset, size = self.members[index]
        return ImageItem(f"{self.path}/{name}", lambda: self._bytes(offset, size), self.stamp)

    def _bytes(self, offset: int, size: int) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            found = stream.read(size)
        if len(found) != size:
            raise ValueError(f"{self.path} ends {size - len(found)} bytes too early")
        return found


class TarStream(ImageSource):
    """The images of one compressed or remote tar, in order; remote ones through fsspec."""

    random_access = False

    def __init__(self, path: str) -> None:
        self.path = path
        if not URL.match(path) and not os.path.isfile(path):
            raise FileNotFoundError(f"{path} does not exist.")

    def __iter__(self) -> Iterator[ImageItem]:
        import fsspec

        found = False
        try:
            with (
                fsspec.open(self.path, "rb") as raw,
                tarfile.open(fileobj=raw, mode="r|*", tarinfo=_StrictHeader) as tar,
            ):
                for member in tar:
                    if _is_image(member):
                        found = True
                        data = tar.extractfile(member).read()  # type: ignore[union-attr]
                        yield ImageItem(f"{self.path}/{member.name}", _given(data))
                    tar.members.clear()  # type: ignore[attr-defined]
        except tarfile.TarError as problem:
            raise ValueError(f"{self.path} is no tar file that can be read to its end: {problem}.") from None
        if not found:
            raise ValueError(f"{self.path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")


def tar_images(path: str) -> ImageSource:
    """The images of a tar file, by its name: by place where it is local and uncompressed, else as a
    stream."""
    remote = URL.match(path)
    path = path if remote else os.path.expanduser(path)
    return TarImages(path) if path.lower().endswith(".tar") and not remote else TarStream(path)


def _is_image(member: tarfile.TarInfo) -> bool:
    return member.isreg() and member.name.lower().endswith(IMAGE_SUFFIXES)


def _given(data: bytes) -> Any:
    return lambda: data
