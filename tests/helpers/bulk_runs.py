"""`voco compress` in processes of its own, and what it must leave behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import voco_plugin as vp
from paths import HELPERS, ROOT
from voco_plugin.store.names import StoreNames, caches_by_name

WORKER = HELPERS / "bulk_worker.py"


COUNT, BATCH = 60, 4


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(HELPERS)])
    return {
        **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", **more,
    }  # fmt: skip


def arguments(place: Path, store: Path, *more: str) -> list[str]:
    return [
        "compress", str(place / "model"), str(place / "photos"), "--store", str(store), "--batch-size",
        str(BATCH), "--json", *more,
    ]  # fmt: skip


def report(text: str) -> None:
    """A figure for who runs this with ``-s``."""
    sys.stderr.write(f"\n{text}\n")


def check_whole(place: Path, where: Path) -> None:
    """Every image is there exactly once, by content and by name, and what is there is right."""
    from voco_plugin.data.images import open_image
    from voco_plugin.inference.answering import compress_images

    model, processor = vp.load(str(place / "model"))
    photos = sorted((place / "photos").iterdir())
    with vp.VoCoCacheStore.for_model(where, model, readonly=True) as store:
        assert sorted(store) == sorted({store.key_of(path) for path in photos})
        checked = store.verify()
        assert checked["records"] == COUNT and checked["bad"] == [] == checked["index"]
        with StoreNames(where, readonly=True) as names:
            assert sorted(entry.name for entry in names) == sorted(map(str, photos))
        for path, cache in zip(photos, caches_by_name(store, list(map(str, photos))), strict=True):
            (alone,) = compress_images(model, processor, [open_image(path)])
            pairs = zip(alone.blocks[0].keys, cache.blocks[0].keys, strict=True)
            assert all((a - b).abs().max() < 1e-5 for a, b in pairs)
