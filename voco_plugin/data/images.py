"""Where every image is opened: a file, a URL, bytes or a PIL image → 8-bit RGB, or an error that names it.

kind                              what is made of it
animated (GIF, APNG, WebP, …)     its first frame
EXIF orientation                  turned upright
16 bits a channel                 scaled: 65535 is white (Pillow's own conversion clips at 255)
transparent (alpha or palette)    laid on white
CMYK, grey, 1 bit, palette        Pillow's conversion; colour profiles are not applied
more than PIL.Image.MAX_IMAGE_PIXELS, floating point, broken, empty, missing      BadImageError
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import logging
import os
import re
import urllib.parse
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

ON_BAD_SAMPLE = ("raise", "skip")
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".j2k", ".bmp", ".gif",
    ".tif", ".tiff",
)  # fmt: skip
_ORIENTATION, _WIDTH, _LENGTH = 0x0112, 0x0100, 0x0101
_SIDES_SWAPPED = (5, 6, 7, 8)
"""EXIF orientations whose width and height are swapped."""
_URL_SECONDS = 30.0
_LONGEST_NAME = 1000
"""Longer texts are images written out in base64, not the name of a file."""
URL = re.compile(r"^[a-z0-9+.-]+://", re.IGNORECASE)


class BadImageError(ValueError):
    """An image that cannot be used. The message names it, and the sample it belongs to, and says why."""


def check_on_bad_sample(value: str) -> str:
    """``value``, or a ``ValueError`` where it is neither ``raise`` nor ``skip``."""
    if value not in ON_BAD_SAMPLE:
        raise ValueError(f"on_bad_sample={value!r} is not known; use raise or skip.")
    return value


def open_image(source: Any, where: str | None = None) -> Image.Image:
    """The image as 8-bit RGB, decoded to its last byte.

    Args:
        source: a path, an http(s) URL, a ``data:`` URL or base64 text, the bytes of a file, a record with
            ``bytes`` or ``path`` (as ``datasets`` keeps undecoded images), or a PIL image.
        where: the sample it belongs to, for the error.

    Raises:
        BadImageError: it is missing, empty, broken, no image, larger than ``PIL.Image.MAX_IMAGE_PIXELS``, or
            of a kind that has no meaning in 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error of our own instead
            with _opened(source) as image:
                _check_size(image)
                return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # on malformed data Pillow raises errors of any class
        begin = f"{where}: " if where else ""
        raise BadImageError(
            f"{begin}image {describe(source)} cannot be read: {_reason(source, error)}."
        ) from None


def image_size(source: Any, where: str | None = None) -> tuple[int, int]:
    """``(width, height)`` that :func:`open_image` would give, read from the file's head: nothing is decoded.

    Raises:
        BadImageError: as :func:`open_image`, as far as the head shows it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(source) as image:
                _check_size(image)
                try:
                    swapped = image.getexif().get(_ORIENTATION, 1) in _SIDES_SWAPPED
                except Exception:  # broken EXIF is ignored, as in to_rgb
                    swapped = False
                if swapped and image.format == "TIFF":  # of which Pillow may give the turned size already
                    tags = image.tag_v2  # type: ignore[attr-defined]
                    swapped = image.size == (tags[_WIDTH], tags[_LENGTH])
                return (image.height, image.width) if swapped else (image.width, image.height)
    except MemoryError:
        raise
    except Exception as error:
        begin = f"{where}: " if where else ""
        raise BadImageError(
            f"{begin}image {describe(source)} cannot be read: {_reason(source, error)}."
        ) from None


def describe(source: Any) -> str:
    """How messages name an image: its path or URL if it has one, else what it is."""
    if isinstance(source, Mapping):
        path, data = source.get("path"), source.get("bytes")
        return str(path) if path else f"of {len(data)} bytes" if data is not None else "without path or bytes"
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "")
        return str(name) if name else f"({source.mode}, {source.width}x{source.height})"
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"of type {type(source).__name__}"
    return text if len(text) <= 300 else f"{text[:40]}… ({len(text)} characters)"


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB, the right way up; see the module for each kind. The caller's image is left as
    it is.

    Raises:
        ValueError: values that no rule scales to 8 bits (floating point, more than 16 bits), or a mode Pillow
            has no conversion for.
    """
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_written_out(text: str) -> bool:
    """Whether ``text`` is an image itself, as JSON files hold them, rather than its name."""
    if text[:5].lower() == "data:":
        return True
    if len(text) <= _LONGEST_NAME:
        return False
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def inline_bytes(text: str) -> bytes | None:
    """The bytes of an image that is written out in ``text`` (a ``data:`` URL, or long base64 text as JSON
    files hold it); ``None`` where ``text`` is a name.

    Raises:
        ValueError: it is a ``data:`` URL whose text is not what it says.
    """
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma:
            raise ValueError("a data: URL needs a comma before its data")
        data = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(data) if head.lower().endswith(";base64") else data
    if len(text) > _LONGEST_NAME:
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(text, validate=True)
    return None


def find_refused(image_processor: Any, images: Iterable[Any]) -> dict[int, str]:
    """Which of ``images``, each tried by itself, an image processor does not take (Qwen's refuses sides of
    more than 200 : 1): number → reason.
    """
    refused = {}
    for number, image in enumerate(images):
        try:
            image_processor(images=[image], return_tensors="pt")
        except MemoryError:
            raise
        except Exception as error:
            size = "x".join(map(str, getattr(image, "size", ())))
            refused[number] = (
                f"{type(image_processor).__name__} refuses {size} pixels: {str(error).rstrip('.')}"
            )
    return refused


def _opened(source: Any) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is not None:
            return Image.open(io.BytesIO(data))
        if path is None:
            raise ValueError("its record has neither bytes nor a path")
        if "://" in str(path) and not str(path).startswith(("http://", "https://")):
            from datasets import Image as Feature  # a member of a remote archive: datasets knows the way

            return nullcontext(Feature().decode_example({"path": path, "bytes": None}))
        source = path
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, (bytes, bytearray)):
        return Image.open(io.BytesIO(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError("give a path, a URL, bytes or a PIL image")
    text = os.fspath(source)
    if text[:8].lower().startswith(("http://", "https://")):
        return Image.open(io.BytesIO(_download(text)))
    data = inline_bytes(text)
    if data is not None:
        return Image.open(io.BytesIO(data))
    if URL.match(text) and not os.path.lexists(text):
        raise ValueError("of URLs, only http(s) and data: are opened; copy it to a file")
    if not (len(text) < 4096 and os.path.lexists(text)):
        try:
            return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
        except (binascii.Error, UnidentifiedImageError, ValueError):
            raise FileNotFoundError(text) from None
    return Image.open(text)


def _download(url: str) -> bytes:
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "voco_plugin"})
    with urllib.request.urlopen(request, timeout=_URL_SECONDS) as answer:
        return answer.read()


def _check_size(image: Image.Image) -> None:
    """Before a pixel is decoded: a small file can claim any size."""
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if not pixels:
        raise ValueError("it has no pixels")
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} is more than {limit} pixels; scale it down, or set "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception as error:  # EXIF is a foreign format inside the file, as often broken as not
        logger.warning("image %s: its EXIF data is broken and ignored (%s)", describe(image), error)
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey. Mode ``I`` (32 bits) is read by its range, as files of 8 and 16 bits both
    come as such."""
    import numpy as np

    if image.mode == "F":
        raise ValueError("its values are floating point, and nothing says what white is; scale it to 8 bits")
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"its values run from {low} to {high}, and nothing says what white is; scale it to 8 bits"
        )
    if image.mode != "I" or high > 255:
        values = (values * 255 + 32767) // 65535
    return Image.fromarray(values.astype(np.uint8))


def _reason(source: Any, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnidentifiedImageError):
        data = source.get("bytes") if isinstance(source, Mapping) else source
        path = source.get("path") if isinstance(source, Mapping) else source
        if isinstance(data, (bytes, bytearray)):
            return "it is no image that Pillow knows" if data else "it is empty"
        empty = (
            isinstance(path, (str, os.PathLike)) and Path(path).is_file() and not Path(path).stat().st_size
        )
        return "the file is empty" if empty else "it is no image that Pillow knows"
    if isinstance(error, Image.DecompressionBombError) and "PIL.Image" not in str(error):
        return f"{error} Scale it down, or set PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
