"""Small videos made with PyAV, and the plainest way to read them: decode everything, then pick."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (96, 64)
MILLISECOND = Fraction(1, 1000)
_FAST = {
    "libx264": {"preset": "veryfast"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
}


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> list[np.ndarray]:
    """A window that pans over noise, so that all frames differ: ``(H, W, 3)`` uint8."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 255, (height, 3 * width, 3), dtype=np.uint8)
    return [np.ascontiguousarray(noise[:, 2 * i % width : 2 * i % width + width]) for i in range(count)]


def write_video(
    path: Path,
    codec: str = "libx264",
    images: Sequence[np.ndarray] | None = None,
    *,
    count: int = 75,
    rate: int = 25,
    key_every: int = 25,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A video of ``images`` (default: :func:`pictures`) at ``rate``, or at ``times`` in milliseconds."""
    import av

    images = pictures(count) if images is None else images
    base = MILLISECOND if times else Fraction(1, rate)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or _FAST.get(codec, {}))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = key_every
        stream.codec_context.time_base = base
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Writes a display matrix (in units of 1) into an MP4: what a phone does that is held another way."""
    data = bytearray(path.read_bytes())
    head = data.find(b"tkhd") + 4
    place = head + 4 + (20 if data[head] == 0 else 32) + 16
    one = 0x10000
    values = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
    data[place : place + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)
    return path


def decode_all(path: Path) -> list[tuple[float, Image.Image]]:
    """``(seconds from the first frame, image)`` of every frame, and nothing else is used of PyAV."""
    import av

    with av.open(str(path)) as file:
        frames = [(frame.pts * frame.time_base, frame.to_image()) for frame in file.decode(video=0)]
    return [(float(time - frames[0][0]), image) for time, image in frames]


def on_screen(times: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """The numbers of the frames on screen at ``wanted``, each once: the last that is not after it, to half a
    millisecond."""
    found = [max(i for i, time in enumerate(times) if time <= t + 0.0005) for t in wanted]
    return list(dict.fromkeys(found))
