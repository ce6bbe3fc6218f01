"""A long conversation over many images: each is compressed once, each turn is read once.

    python examples/long_chat.py runs/quickstart/voco photos/ --images 50 --store photos.store

Images come in a few at a time with a question after them. Half-way the session is saved and restored, and at
the end it is forked: two questions are asked from the same state. The table shows what a turn reads (its own
tokens, however long the conversation is) and what the conversation holds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from pathlib import Path

import voco_plugin as vp
from voco_plugin.cli.inputs import find_images
from voco_plugin.cli.output import emit, human_bytes
from voco_plugin.data.images import open_image


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model with VoCo tokens: a folder or a hub id")
    parser.add_argument("folder", help="a folder of images")
    parser.add_argument("--images", type=int, default=50, help="how many to show (they repeat if need be)")
    parser.add_argument("--per-turn", type=int, default=5, help="images a turn")
    parser.add_argument("--store", help="a store for the caches: images in it are not compressed again")
    parser.add_argument("--question", default="What is new?")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args(argv)

    model, processor = vp.load(args.model)
    model.eval()
    paths = find_images([args.folder])
    shown = itertools.islice(itertools.cycle(paths), args.images)
    with contextlib.ExitStack() as stack:
        store = None
        if args.store:
            store = stack.enter_context(vp.VoCoCacheStore.for_model(args.store, model))
        session = vp.VoCoSession(model, processor, store=store)
        turns, read, restored = 0, [], False
        emit("turn  images  slots read  slots held      held  seconds  answer")
        while batch := list(itertools.islice(shown, args.per_turn)):
            before, start = session.num_slots, time.perf_counter()
            session.add(*(open_image(path) for path in batch))
            text = session.ask(args.question, max_new_tokens=args.max_new_tokens)
            turns += 1
            read.append(session.num_slots - before)
            emit(
                f"{turns:4}  {session.num_images:6}  {read[-1]:10}  {session.num_slots:10}  "
                f"{human_bytes(session.nbytes):>8}  {time.perf_counter() - start:7.2f}  {text!r}"
            )
            if not restored and session.num_images * 2 >= args.images:
                restored = True
                session = _saved_and_restored(session, model, processor, store)
        fork = session.fork()
        first = session.ask("What was in the first image?", max_new_tokens=args.max_new_tokens)
        last = fork.ask("What was in the last image?", max_new_tokens=args.max_new_tokens)
    emit(f"the first image: {first!r}; from the same state, the last image: {last!r}")
    return {"turns": turns, "images": session.num_images, "read": read, "bytes": session.nbytes}


def _saved_and_restored(session: vp.VoCoSession, model, processor, store) -> vp.VoCoSession:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.safetensors"
        session.save(path)
        emit(f"      saved and restored: {human_bytes(path.stat().st_size)}")
        return vp.VoCoSession.load(path, model, processor, store=store)


if __name__ == "__main__":
    main()
