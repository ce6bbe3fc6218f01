"""Images inside tar files (WebDataset shards), read in place: nothing is unpacked.

A local uncompressed tar is indexed once by its headers (an image is then two numbers: where it begins, how
long it is); a compressed or remote one is read in order. Members that are not images by their suffix
(captions, labels) are skipped, and so are hidden ones (macOS writes a ``._x.png`` beside each ``x.png``). A
link is the image it leads to; read in order, where that has gone by, it is a bad image. A broken header ends
the reading with an error, where ``tarfile`` by itself would end it silently.
"""

from __future__ import annotations

import os
import posixpath
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
        files: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:", tarinfo=_StrictHeader) as tar:
                for member in tar:
                    if member.isreg():
                        files[posixpath.normpath(member.name)] = member.offset_data, member.size
                    elif member.islnk() or member.issym():
                        links[posixpath.normpath(member.name)] = _target(member)
                    if _is_image(member):
                        self.members.append((member.name, member.offset_data, member.size))
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist.") from None
        except tarfile.TarError as problem:
            raise ValueError(f"{path} is no tar file that can be read to its end: {problem}.") from None
        self.nowhere: dict[int, str] = {}
        for number, (name, _, _) in enumerate(self.members):
            target, passed = posixpath.normpath(name), set()
            while target in links and target not in passed:
                passed.add(target)
                target = links[target]
            if passed and target in files:
                self.members[number] = name, *files[target]
            elif passed:
                self.nowhere[number] = target
        if not self.members:
            raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> ImageItem:
        name, offset, size = self.members[index]
        target = self.nowhere.get(index % len(self.members))
        if target is not None:
            missing = _leads_to(target, "which the archive does not hold")
            return ImageItem(f"{self.path}/{name}", missing, self.stamp)
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
                # fsspec would take "::" in the name of a file for a chain of protocols
                (fsspec.open if URL.match(self.path) else open)(self.path, "rb") as raw,
                tarfile.open(fileobj=raw, mode="r|*", tarinfo=_StrictHeader) as tar,
            ):
                for member in tar:
                    if _is_image(member):
                        found = True
                        shown = f"{self.path}/{member.name}"
                        if member.isreg():
                            data = tar.extractfile(member).read()  # type: ignore[union-attr]
                            yield ImageItem(shown, _given(data))
                        else:
                            why = "and this archive is read in order: unpack it, or give it as a local .tar"
                            yield ImageItem(shown, _leads_to(_target(member), why))
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
    shown = not any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/"))
    a_file = member.isreg() or member.islnk() or member.issym()
    return a_file and shown and member.name.lower().endswith(IMAGE_SUFFIXES)


def _target(link: tarfile.TarInfo) -> str:
    """The member that a hard link (by its name in the archive) or a symbolic one (from its folder) leads
    to.
    """
    start = "" if link.islnk() else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(start, link.linkname))


def _leads_to(target: str, why: str) -> Any:
    def refuse() -> bytes:
        raise ValueError(f"it is a link to {target}, {why}")

    return refuse


def _given(data: bytes) -> Any:
    return lambda: data
