"""Writes that are whole or not there: a temporary file or folder beside the target, flushed, then renamed.
And where an installed package lies that carries files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; it replaces ``path`` when the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a saved file gets the usual mode
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to write to; it becomes ``path`` when the block ends without an error.

    Raises:
        FileExistsError: ``path`` is there already, and is not an empty folder.
    """
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; give another name, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        os.replace(temporary, target)  # takes the place of an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


PACKAGE = "package:"
"""Before the import name of an installed package that carries weights or data."""


def package_folders(package: str) -> list[Path] | None:
    """The folders of an installed package, found without running anything of it; ``None`` where there is none
    of that name.
    """
    spec = None
    if package.isidentifier():
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)
    return None if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
