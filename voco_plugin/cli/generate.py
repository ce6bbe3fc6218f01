"""``voco generate``: answers from images, or from cache files without the images; videos:
``generate_video.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import output
from .generate_video import add_video_options, is_video, run_video
from .inputs import add_model_options, find_images, load_model, open_image, positive, read_questions


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "generate",
        parents=[common],
        help="answer questions from images or from a cache",
        description="Ask every question of every image alone; --together puts all images into one prompt.\n"
        "With --cache the images are not needed: a cache file holds one image or many. With --store "
        "neither:\n--name asks for an image by the name it was compressed under, --image by its content.",
        epilog="examples:\n  voco generate runs/gridworld_voco --image a.png --question 'What is at b2?'\n"
        "  voco generate runs/gridworld_voco --cache both.safetensors --index 1 --questions asked.txt "
        "--json\n"
        "  voco generate runs/gridworld_voco --store caches/ --name photos/a.png --question 'What is at "
        "b2?'\n"
        "  voco generate MODEL --video clip.mp4 --fps 1 --budget 256 --question 'What happens first?'\n",
    )
    add_model_options(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--image", action="append", metavar="FILE", help="an image or a folder; may be repeated"
    )
    source.add_argument(
        "--cache", action="append", metavar="FILE", help="a cache file or a folder; may be repeated"
    )
    source.add_argument(
        "--name", action="append", metavar="NAME", help="an image of --store by its name; may be repeated"
    )
    source.add_argument(
        "--video",
        metavar="FILE",
        help="a video file, GIF, folder of frames, URL or camera; with --store a name",
    )
    parser.add_argument("--store", metavar="DIR", help="a store that voco compress --store has filled")
    parser.add_argument(
        "--num-tokens",
        type=positive,
        metavar="K",
        help="of --store and --video: VoCo tokens an image (the model's)",
    )
    parser.add_argument("--question", action="append", metavar="TEXT", help="what to ask; may be repeated")
    parser.add_argument("--questions", metavar="FILE", help="a file with one question a line")
    parser.add_argument(
        "--index", type=int, action="append", metavar="I", help="only the I-th image (from 0); repeatable"
    )
    parser.add_argument("--together", action="store_true", help="all images in one prompt, in order")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, help="length of an answer (default: %(default)s)"
    )
    parser.add_argument("--num-beams", type=positive, default=1, help="beam search with so many beams")
    parser.add_argument(
        "--batch-size", type=positive, default=16, help="prompts at a time (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")
    add_video_options(parser)


def run(args: argparse.Namespace) -> int:
    questions = read_questions(args.question, args.questions)
    video = is_video(args)
    _check_store_options(args)
    if video and args.video is not None:
        return run_video(args, questions, [], args.video)
    if args.cache:
        paths = _cache_files(args.cache)
        names, items = _read_caches(paths)  # checked before the model loads
        if video:
            return run_video(args, questions, _chosen(args, items), ", ".join(map(str, paths)))
    else:
        names = args.name or [str(p) for p in find_images(args.image or [])]
        items = list(names)
    if args.index is not None:
        names, items = _chosen(args, names), _chosen(args, items)
    model, processor = load_model(args)

    from ..cache import VoCoCache
    from ..inference.answering import answer

    if args.store:
        items = _from_store(args, model, names)
    if args.cache or args.store:
        items = [cache.to(model.device) for cache in items]
        if args.together:
            items = [VoCoCache.cat(items)]
    elif items:
        pictures = [open_image(path) for path in items]
        items = [pictures] if args.together else [[picture] for picture in pictures]
    if args.together:
        names = [", ".join(names)]
    asked = [(name, item, q) for name, item in zip(names, items, strict=True) for q in questions]
    if not items:  # a text-only prompt
        asked = [("", None, q) for q in questions]
    given: dict[str, Any] = {}
    if items:
        given = {"caches" if args.cache or args.store else "images": [item for _, item, _ in asked]}
    with output.progress(total=len(asked), unit="answer", quiet=args.json) as bar:
        answers = answer(
            model, processor, [q for _, _, q in asked], max_new_tokens=args.max_new_tokens,
            num_beams=args.num_beams, batch_size=args.batch_size, tick=bar.update, **given,
        )  # fmt: skip
    if args.json:
        output.emit_json(
            [
                {"image": n or None, "question": q, "answer": a}
                for (n, _, q), a in zip(asked, answers, strict=True)
            ]
        )
        return 0
    before = None
    for (name, _, question), text in zip(asked, answers, strict=True):
        if name != before and name:
            output.emit(name)
            before = name
        output.emit(f"  {question}\n    {text}")
    return 0


def _chosen(args: argparse.Namespace, items: list[Any]) -> list[Any]:
    """Those that ``--index`` names, in its order; all without it."""
    for index in args.index or []:
        if not -len(items) <= index < len(items):
            raise ValueError(
                f"--index {index} is outside the {len(items)} image(s) given (0…{len(items) - 1})."
            )
    return items if args.index is None else [items[i] for i in args.index]


def _check_store_options(args: argparse.Namespace) -> None:
    """Raises where ``--store``, ``--name`` and ``--num-tokens`` do not go together."""
    if args.store and not (args.name or args.image or args.video):
        raise ValueError("--store answers about --name NAME, --image FILE or --video NAME: give one of them.")
    for option in ("name", "num_tokens"):
        if getattr(args, option) and not args.store and not args.video:
            raise ValueError(f"--{option.replace('_', '-')} is of a store: give --store DIR.")


def _from_store(args: argparse.Namespace, model: Any, names: list[str]) -> list[Any]:
    """The cache of each image, by its name or by the content of its file."""
    from ..store.names import caches_by_name
    from ..store.store import VoCoCacheStore

    with VoCoCacheStore.for_model(args.store, model, readonly=True) as store:
        if args.name:
            return caches_by_name(store, names, args.num_tokens)
        found = []
        for name in names:
            key = store.key_of(open_image(name), args.num_tokens)
            if key not in store:
                raise ValueError(
                    f"the content of {name} is not in store {args.store} for this K: "
                    f"voco compress {args.model} {name} --store {args.store}"
                )
            found.append(store.get(key))
        return found


def _cache_files(sources: list[str]) -> list[Path]:
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(path.glob("*.safetensors"))
            if not inside:
                raise ValueError(f"folder {source} holds no cache file (.safetensors).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"cache {source} does not exist; make it with `voco compress`.")
    return found


def _read_caches(paths: list[Path]) -> tuple[list[str], list[Any]]:
    """A name and a cache of one block for every image of every file."""
    from ..cache import VoCoCache

    names: list[str] = []
    items: list[Any] = []
    for path in paths:
        cache = VoCoCache.load(path)
        for index in range(len(cache)):
            names.append(str(path) if len(cache) == 1 else f"{path}[{index}]")
            items.append(cache[index])
    return names, items
