"""Images and videos of a request: a data URL or a remote one → pixels.

What a file claims is checked before it is decoded: its size before its base64 is, its format and its pixels
before they are. Formats are those that people have images and videos in; a decoder knows many more, some of
which open files or start programs.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import tempfile
import urllib.parse
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.images import BadImageError, image_size, open_image
from ...video.frames import Frame
from .errors import ApiError
from .settings import ServerSettings

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_HEAD = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?", re.IGNORECASE
)
_LONGEST_HEAD = 200
_CONTAINERS = (
    (4, b"ftyp", ".mp4", "mov,mp4,m4a,3gp,3g2,mj2"),
    (0, b"\x1aE\xdf\xa3", ".mkv", "matroska,webm"),
    (8, b"AVI ", ".avi", "avi"),
    (0, b"OggS", ".ogv", "ogg"),
)
"""Where a video file says what it is, and FFmpeg's names of it: no playlist, which would name other files."""
_ANIMATIONS = ((0, b"GIF8", ".gif"), (8, b"WEBP", ".webp"), (0, b"\x89PNG", ".png"))


def data_of_url(url: str, kind: str, limit: int, param: str) -> bytes:
    """The bytes that a data URL of ``kind`` (``image`` or ``video``) holds.

    Raises:
        ApiError: it is none, is of another kind, or holds more than ``limit`` bytes.
    """
    comma = url.find(",", 0, _LONGEST_HEAD)
    head = _HEAD.fullmatch(url[:comma].rstrip()) if comma > 0 else None
    if head is None:
        raise ApiError(
            f"this data URL has no head that can be read; begin it with data:{kind}/…;base64, and the data.",
            param,
        )
    found = (head["type"] or "text/plain").lower()
    if found.split("/")[0] != kind and found != "application/octet-stream":
        raise ApiError(f"this data URL holds {found[:40]}; send data:{kind}/…;base64,….", param)
    length = len(url) - comma - 1
    if (length * 3 // 4 if head["base64"] else length // 3) > limit:
        raise _too_large(kind, limit, param)
    body = url[comma + 1 :]
    try:
        if head["base64"]:
            # whitespace and a missing end are common; anything else is not base64
            body = re.sub(r"\s+|%0[aAdD]|%20", "", body).rstrip("=")
            body = urllib.parse.unquote(body).rstrip("=") if "%" in body else body
            if "-" in body or "_" in body:
                body = body.replace("-", "+").replace("_", "/")
            data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        else:
            data = urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        raise ApiError(f"the data of this {kind} is not base64; encode the file's bytes.", param) from None
    if not data:
        raise ApiError(f"this data URL is empty; send the {kind}'s bytes.", param)
    if len(data) > limit:
        raise _too_large(kind, limit, param)
    return data


def image_of_bytes(data: bytes, settings: ServerSettings, param: str) -> Any:
    """The image in ``data``, decoded.

    Raises:
        ApiError: it is no image of a known format, is broken, or has more pixels than an image may.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()):
                pass
    except Exception:  # on malformed data Pillow raises errors of any class
        raise ApiError(
            f"these {len(data)} bytes are no image that can be read; send one of {', '.join(_formats())}.",
            param, "invalid_image",
        ) from None  # fmt: skip
    try:
        width, height = image_size(data)
        _check_pixels(width, height, settings, param)
        return open_image(data)
    except BadImageError as problem:
        raise ApiError(str(problem), param, "invalid_image") from None


def _formats() -> list[str]:
    """Those of :data:`IMAGE_FORMATS` that this Pillow has: it stumbles over one that it was built without."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def frames_of_bytes(data: bytes, settings: ServerSettings, param: str) -> list[Frame]:
    """``video_frames`` frames of the video in ``data``, evenly spread.

    Raises:
        ApiError: it is no video of a known format, is broken, or its frames are too large.
    """
    from ...video.probing import probe
    from ...video.reading import read_video

    suffix, formats = _container(data, param)
    options = None if formats is None else {"protocol_whitelist": "file", "format_whitelist": formats}
    with tempfile.TemporaryDirectory(prefix="voco_video_") as folder:
        path = Path(folder) / f"video{suffix}"
        path.write_bytes(data)
        try:
            if formats is None:
                _check_pixels(*image_size(data), settings, param)
            else:
                _check_pixels(*(probe(path, options=options).size or (0, 0)), settings, param)
            frames = list(read_video(path, count=settings.video_frames, options=options))
        except ImportError:
            raise ApiError(
                "this server reads no videos (PyAV is not installed); send frames as images.",
                param, "unsupported_field",
            ) from None  # fmt: skip
        except BadImageError as problem:
            reason = str(problem).replace(str(path), "of the request").replace(path.name, "of the request")
            raise ApiError(reason, param, "invalid_video") from None
    if not frames:
        raise ApiError("this video gives no frame; send one that has some.", param, "invalid_video")
    return frames


def _container(data: bytes, param: str) -> tuple[str, str | None]:
    """The file suffix, and FFmpeg's names of the format (``None``: an animation, which Pillow reads)."""
    for at, mark, suffix, formats in _CONTAINERS:
        if data[at : at + len(mark)] == mark:
            return suffix, formats
    for at, mark, suffix in _ANIMATIONS:
        if data[at : at + len(mark)] == mark:
            return suffix, None
    raise ApiError(
        f"these {len(data)} bytes are no video that can be read; send MP4, WebM, Matroska, AVI, Ogg or an "
        "animated GIF, WebP or PNG.",
        param, "invalid_video",
    )  # fmt: skip


def _check_pixels(width: int, height: int, settings: ServerSettings, param: str) -> None:
    if width * height > settings.max_pixels:
        raise ApiError(
            f"{width}x{height} are more than {settings.max_pixels} pixels; scale it down.",
            param,
            "image_too_large",
        )


def _too_large(kind: str, limit: int, param: str) -> ApiError:
    return ApiError(
        f"this {kind} has more than {limit} bytes; send a smaller one.", param, f"{kind}_too_large"
    )


__all__ = ["IMAGE_FORMATS", "data_of_url", "frames_of_bytes", "image_of_bytes"]
