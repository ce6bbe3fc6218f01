"""Several processes make one store at the same moment, for test_bulk_processes.py: FOLDER ROUNDS WORLD RANK.

In each round all of them wait for the same tenth of a second, open FOLDER/ROUND as a new store, put a record
and a name of their own, and close it. Prints what went wrong.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import voco_plugin as vp
from voco_plugin.store.names import NameEntry, StoreNames

MADE_BY = {"model": "a", "rule": "isolated", "num_tokens": 1}


def main() -> None:
    folder, rounds, world, rank = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    tensors = (torch.ones(1, 1, 8),)
    cache = vp.VoCoCache([vp.VoCoBlock(tensors, tensors, 1, 1, 1)], fingerprint=MADE_BY)
    (folder / f"ready.{rank}").touch()
    while len(list(folder.glob("ready.*"))) < world:
        time.sleep(0.01)
    for number in range(rounds):
        time.sleep(0.1 - time.time() % 0.1)
        where, key = folder / str(number), f"{rank:064x}"
        with vp.VoCoCacheStore(where, fingerprint=MADE_BY) as store, StoreNames(where) as names:
            store.put(key, cache)
            names.put_many([NameEntry(f"image {rank}", 1, key)])


if __name__ == "__main__":
    main()
