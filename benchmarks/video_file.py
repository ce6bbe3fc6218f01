"""Real video files through ``voco compress`` and ``voco generate``: peak memory against length.

    python benchmarks/video_file.py [--minutes 1 10] [--codecs h264 vp9] [--fps 1] [--out results.json]

Each file is a pan over photographs (scikit-image's, or scikit-learn's two without it), written with
PyAV. Both commands run in a process of their own, whose peak resident memory is the operating system's
(``ru_maxrss``). Flat means: a longer file takes no more. ``--quick`` is 5 and 15 seconds of video.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from voco_plugin.cli.gridworld import copy_base

WIDTH, HEIGHT, RATE = 320, 240, 24
CODECS = {
    "h264": ("libx264", ".mp4", {"preset": "veryfast", "crf": "26"}),
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "realtime", "cpu-used": "8", "b": "400k"}),
}
SECONDS_A_PHOTO = 10


def photographs() -> list[Image.Image]:
    """Pictures to pan over, each at least half as large again as a frame."""
    try:
        from skimage import data

        found = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    except ImportError:
        from sklearn.datasets import load_sample_images

        found = load_sample_images().images
    side = 3 * WIDTH // 2, 3 * HEIGHT // 2
    return [Image.fromarray(values).convert("RGB").resize(side, Image.Resampling.BICUBIC) for values in found]


def pan(count: int) -> Iterator[np.ndarray]:
    """``count`` frames ``(H, W, 3)``: a window moves over a photograph, then over the next."""
    photos = [np.asarray(photo) for photo in photographs()]
    a_photo = SECONDS_A_PHOTO * RATE
    for number in range(count):
        turn, step = divmod(number, a_photo)
        photo = photos[turn % len(photos)]
        share = step / a_photo if turn % 2 == 0 else 1 - step / a_photo
        top, left = int(share * (HEIGHT // 2)), int((turn % 3 / 2) * (WIDTH // 2) * share)
        yield np.ascontiguousarray(photo[top : top + HEIGHT, left : left + WIDTH])


def write(path: Path, codec: str, seconds: float) -> None:
    """The video file, frame by frame."""
    import av

    name, _, options = CODECS[codec]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(name, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = 10 * RATE
        stream.codec_context.time_base = Fraction(1, RATE)
        for number, values in enumerate(pan(int(seconds * RATE))):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def child(*command: str) -> tuple[Any, dict[str, float]]:
    """A ``voco`` command: its JSON, its seconds and its peak resident bytes.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "voco_plugin", *command, "--json"], stdout=out, stderr=err
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        if process.returncode:
            raise RuntimeError(f"voco {' '.join(command)}: {err.read().decode()[-500:]}")
        scale = 1 if sys.platform == "darwin" else 1024
        cost = {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": used.ru_maxrss * scale}
        return json.load(out), cost


def measure(codec: str, seconds: float, model: str, fps: float, folder: Path) -> dict[str, Any]:
    """One file: written, compressed, asked about."""
    path, store = folder / f"{codec}{CODECS[codec][1]}", folder / f"{codec}-{seconds:g}"
    write(path, codec, seconds)
    made, compress = child("compress", model, str(path), "--fps", str(fps), "--store", str(store))
    _, generate = child(
        "generate", model, "--store", str(store), "--name", str(path), "--question", "What is at b2?",
        "--max-new-tokens", "4",
    )  # fmt: skip
    return {
        "codec": codec, "video_seconds": seconds, "file_bytes": path.stat().st_size,
        "frames": made["images"], "frames_a_second": round(made["images_per_second"], 1),
        "store_bytes": made["store"]["bytes"], "compress": compress, "generate": generate,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--fps", type=float, default=1)
    parser.add_argument("--model", help="default: the shipped tiny one")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", metavar="FILE")
    args = parser.parse_args(argv)
    lengths = [5, 15] if args.quick else [60 * m for m in args.minutes]
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or f"{folder}/base"
        if not args.model:
            copy_base(model)
        points = [
            measure(codec, seconds, model, args.fps, Path(folder))
            for codec in args.codecs
            for seconds in lengths
        ]
    result = {"size": [WIDTH, HEIGHT], "file_fps": RATE, "fps": args.fps, "points": points}
    text = json.dumps(result, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return result


if __name__ == "__main__":
    main()
