"""What several commands share: models by path, images by file or folder, questions by option or file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.model_paths import check_model_path
from ..registry import load_plugin
from ..store.sources.image_items import IMAGE_SUFFIXES
from . import output


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``MODEL`` and how to load it."""
    parser.add_argument(
        "model", metavar="MODEL", help="a VoCo checkpoint or adapter, an existing VLM, or a hub id"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: the checkpoint's"
    )
    parser.add_argument(
        "--plugin", action="append", metavar="FILE", help="a Python file that registers components"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def load_model(args: argparse.Namespace, voco: Any = None, source: str | None = None) -> tuple[Any, Any]:
    """``(model, processor)`` of ``args.model`` (or of ``source``, in its place), VoCo attached."""
    source = args.model if source is None else source
    for file in getattr(args, "plugin", None) or []:
        load_plugin(file)
    check_model_path(source)
    output.status(f"loading {source}", quiet=getattr(args, "json", False))
    import torch

    from ..models import load

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(source, voco, dtype=args.dtype, device=device)


def add_bad_sample_option(parser: argparse.ArgumentParser, what: str) -> None:
    """``--on-bad-sample raise|skip``."""
    parser.add_argument(
        "--on-bad-sample",
        choices=("raise", "skip"),
        default="raise",
        help=f"an image that cannot be read: raise (default), or skip: {what}, named on stderr and counted",
    )


def find_images(sources: Sequence[str], missing: bool = False) -> list[Path | str]:
    """The image files (and http(s) URLs) named, and the images of each folder named (not its subfolders),
    sorted by name within a folder.

    Args:
        missing: whether a name of which there is no file is kept, to be found missing when it is opened.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a folder holds no image.
    """
    found: list[Path | str] = []
    for source in sources:
        path = Path(source).expanduser()
        if source.lower().startswith(("http://", "https://")):
            found.append(source)
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"folder {source} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
            found += inside
        elif missing or path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"image {source} does not exist.")
    return found


def open_image(path: str | Path) -> Any:
    """The image as RGB; see :func:`voco_plugin.data.images.open_image`.

    Raises:
        BadImageError: the file is missing, no image, or a broken one.
    """
    from ..data.images import open_image as opened

    return opened(path)


def read_questions(given: Sequence[str] | None, file: str | None) -> list[str]:
    """The questions of ``--question`` and of ``--questions FILE`` (one a line).

    Raises:
        ValueError: there is none.
    """
    questions = list(given or [])
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--questions {file} does not exist.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        questions += [line.strip() for line in lines if line.strip()]
    if not questions:
        raise ValueError(
            "nothing to ask: give --question TEXT (more than once if you like) or --questions FILE."
        )
    return questions


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
