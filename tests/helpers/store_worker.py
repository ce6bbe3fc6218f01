"""What the processes of test_store_processes.py do to a store: ``work(…, WHAT, FOLDER, …)``.

write FOLDER FIRST COUNT MAX   puts caches FIRST … FIRST + COUNT − 1, one or several at a time, and says a
                               number once its put has returned; MAX bytes may be kept (0: no limit)
read FOLDER SECONDS            reads whatever is there and compares it, and says how many it read
hold FOLDER                    opens a view, says so, and waits to be killed
"""

from __future__ import annotations

import os
import time

from stores import MADE_BY, key, made, same
from voco_plugin.store import VoCoCacheStore


def numbered(number: int):
    """The cache of a number: sizes differ, from inline in a page to many pages."""
    return made(number, tokens=1 + number % 5, layers=2 + number % 3, dim=16 << (number % 4))


def say(*words: object) -> None:
    """A line to whoever started this process, in one write."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(folder: str, first: str, count: str, limit: str) -> None:
    store = VoCoCacheStore(folder, fingerprint=MADE_BY, max_bytes=int(limit) or None)
    number, stop = int(first), int(first) + int(count)
    say("ready")
    while number < stop:
        batch = range(number, min(number + 1 + number % 4, stop))
        store.put_many((key(n), numbered(n)) for n in batch)
        say(*batch)
        number = batch.stop
    store.close()


def read(folder: str, seconds: str) -> None:
    end, count = time.monotonic() + float(seconds), 0
    with VoCoCacheStore(folder, readonly=True) as store:
        names = {key(n): n for n in range(2000)}
        say("ready")
        while time.monotonic() < end:
            for name in list(store)[-50:]:
                try:
                    with store.view() as view:
                        cache = view[name]
                        assert same(cache, numbered(names[name]))
                    assert same(store.get(name), numbered(names[name]))
                except KeyError:
                    continue  # evicted since it was listed
                count += 1
    say(count)


def hold(folder: str) -> None:
    with VoCoCacheStore(folder, readonly=True) as store, store.view() as view:
        view[next(iter(store))]
        say("ready")
        time.sleep(600)


def work(saying, what: str, *arguments: str) -> None:
    """One of the above, whose lines (and errors) go to the connection ``saying``."""
    for stream in (1, 2):
        os.dup2(saying.fileno(), stream)
    {"write": write, "read": read, "hold": hold}[what](*arguments)
