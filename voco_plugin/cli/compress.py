"""``voco compress``: images → cache files; into a store or shards: ``compress_bulk.py``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output
from .compress_options import add_bulk_options, check_no_bulk_options
from .inputs import add_bad_sample_option, add_model_options, find_images, load_model, positive
from .preconditions import check_target
from .video_options import add_video_options, check_no_video, video_options

if TYPE_CHECKING:
    from ..store.sources.image_items import ImageItem, ImageSource


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "compress",
        parents=[common],
        help="compress images into a store, shards or cache files",
        description="Compress each image alone (stage 1) and keep the keys and values of its VoCo tokens.\n"
        "--store: a database by content; a run that was stopped goes on where it was, nothing is computed "
        "twice.\n--shards: Parquet files under any fsspec URL. --out: cache files; a name ending in "
        ".safetensors holds\nall images in order, else it is a folder with one file per image (or video).",
        epilog="examples:\n  voco compress runs/gridworld_voco photos/ --store caches/\n"
        "  voco compress MODEL 'train-{0000..0031}.tar' --store caches/ --workers 4\n"
        "  voco compress MODEL llava_665k.json --image-folder coco/ --store caches/ --on-bad-sample skip\n"
        "  voco compress MODEL org/dataset --split train --streaming --shards s3://bucket/caches\n"
        "  torchrun --nproc_per_node 8 -m voco_plugin compress MODEL data.parquet --store caches/\n"
        "  voco compress MODEL photos/ --store caches/ --engine ray --workers 8\n"
        "  voco compress runs/gridworld_voco a.png b.png --out both.safetensors\n"
        "  voco compress MODEL talk.mp4 --fps 1 --store caches/\n",
    )
    add_model_options(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="DATASET",
        help="image files, folders, tar files, JSON/JSONL, Parquet, saved datasets or hub ids (with --out: "
        "image files and folders)",
    )
    parser.add_argument("--out", metavar="OUT", help="cache files: a .safetensors file, or a folder")
    add_video_options(parser)
    add_bulk_options(parser)
    parser.add_argument(
        "--num-tokens", type=positive, metavar="K", help="VoCo tokens an image (default: the model's)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="images at a time (default: %(default)s)"
    )
    add_bad_sample_option(parser, "it gets no cache")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    if args.out is None:
        from .compress_bulk import run as run_bulk

        return run_bulk(args, load_model)
    check_no_bulk_options(args)
    return _to_files(args)


def _to_files(args: argparse.Namespace) -> int:
    skip = args.on_bad_sample == "skip"
    source, files = _named_source(args, skip)
    out = Path(args.out).expanduser()
    single = out.suffix == ".safetensors"
    if single and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file name, or a folder without .safetensors.")
    if not single and out.is_file():
        raise ValueError(
            f"--out {out} is a file that is no .safetensors file; give a folder, or NAME.safetensors."
        )
    check_target(out if single else out / "x", "--out")
    targets = {str(out): out} if single else _targets(out, files)
    model, processor = load_model(args)

    from ..cache import VoCoCache
    from ..inference.answering import compress_images

    opener = Opener(source, skip)
    done: list[str] = []
    caches: dict[str, list[VoCoCache]] = {}
    written: dict[str, None] = {}
    cached = full = 0
    start = time.perf_counter()
    with output.progress(total=source.about(0, 1), unit="image", quiet=args.json) as bar:
        made = compress_images(
            model,
            processor,
            opener,
            num_tokens=args.num_tokens,
            batch_size=args.batch_size,
            tick=bar.update,
            refused=opener.refuse,
        )
        for cache in made:
            name, file = opener.next_good()
            file = str(out) if single else file
            done.append(name)
            if file not in caches:
                _save(caches, targets)  # what came before is whole
            caches.setdefault(file, []).append(cache)
            written[str(targets[file])] = None
            cached, full = (a + b for a, b in zip((cached, full), cache_sizes(cache), strict=True))
    seconds = time.perf_counter() - start
    if not done:
        why = opener.skipped[0]["reason"] if opener.skipped else "that part of the videos holds no frame."
        what = "videos" if source.sampling else "images"
        raise ValueError(f"none of the {len(files)} {what} can be used: {why}")
    _save(caches, targets)
    result = {
        "images": done, "files": list(written),
        "skipped_samples": len(opener.skipped), "skipped": opener.skipped, "seconds": seconds,
        "images_per_second": len(done) / seconds, "cache_bytes": cached, "full_kv_bytes": full,
        "compression": full / cached,
    }  # fmt: skip
    if args.json:
        output.emit_json(result)
        return 0
    if opener.skipped:
        output.emit(f"{len(opener.skipped)} of {opener.seen} images skipped (--on-bad-sample skip)")
    output.emit(
        f"{len(done)} image(s) in {seconds:.1f} s ({result['images_per_second']:.1f} images/s) → {out}"
    )
    output.emit(
        f"cache {output.human_bytes(cached)}, all vision tokens' keys and values {output.human_bytes(full)}: "
        + output.size_words(full, cached)
    )
    return 0


class Opener:
    """Opens images in order; a bad one raises, or is named on stderr and left out.

    Attributes:
        seen: how many have come.
        skipped: what was left out, as ``{"image", "reason"}``.
    """

    def __init__(self, items: Iterable[ImageItem], skip: bool) -> None:
        self.items, self.skip, self.seen = items, skip, 0
        self.opened: list[tuple[str, str]] = []
        self.skipped: list[dict[str, str]] = []
        self._refused: set[int] = set()
        self._next = 0

    def __iter__(self) -> Iterator[Any]:
        from ..data.images import BadImageError

        for item in self.items:
            self.seen += 1
            try:
                image = item.open()
            except BadImageError as problem:
                if not self.skip:
                    raise
                self._leave_out(item.name, str(problem))
                continue
            self.opened.append((item.name, item.series or item.name))
            yield image

    def refuse(self, number: int, reason: str) -> None:
        """Leave out the ``number``-th image opened: the processor does not take it."""
        from ..data.images import BadImageError

        name = self.opened[number][0]
        problem = f"image {name} cannot be used: {reason}."
        if not self.skip:
            raise BadImageError(problem)
        self._refused.add(number)
        self._leave_out(name, problem)

    def next_good(self) -> tuple[str, str]:
        """The name of the next image that was not left out, and of the video it is of, or its own again."""
        while self._next in self._refused:
            self._next += 1
        self._next += 1
        return self.opened[self._next - 1]

    def _leave_out(self, name: str, reason: str) -> None:
        self.skipped.append({"image": name, "reason": reason})
        output.note(f"skipped: {reason}")


def _named_source(args: argparse.Namespace, skip: bool) -> tuple[ImageSource, list[str]]:
    """The images or frames of videos that are named, and the files they are of; what is not there is found
    before a model loads."""
    from ..store.sources.image_items import FileImages
    from ..store.sources.video_sources import video_source

    videos = video_options(args)
    if videos is not None:
        frames = video_source(args.images, videos, missing=skip)
        return frames, frames.videos
    check_no_video(args.images)
    images = FileImages([])
    images.paths = [str(path) for path in find_images(args.images, missing=skip)]  # one named twice is two
    return images, images.paths


def _save(caches: dict[str, list[Any]], targets: Mapping[str, Path]) -> None:
    """Write what has been gathered, a file each, and let go of it."""
    from ..cache import VoCoCache

    for name, parts in caches.items():
        VoCoCache.cat(parts).save(targets[name])
    caches.clear()


def cache_sizes(cache: Any) -> tuple[int, int]:
    """Bytes of a cache, and of the keys and values of the vision tokens it stands for."""
    full = sum(block.nbytes // block.num_tokens * block.num_vision for block in cache)
    return cache.nbytes, full


def _targets(folder: Path, files: Sequence[str]) -> dict[str, Path]:
    """One file per image; images of one name in different folders would overwrite each other, which
    raises."""
    targets = [folder / f"{Path(path).stem}.safetensors" for path in files]
    seen: dict[Path, str] = {}
    for path, target in zip(files, targets, strict=True):
        if target in seen:
            raise ValueError(
                f"{seen[target]} and {path} would both become {target.name}; compress them into different "
                f"folders, "
                "or all into one file (--out NAME.safetensors)."
            )
        seen[target] = path
    return dict(zip(files, targets, strict=True))
