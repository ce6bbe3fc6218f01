"""``voco store``: look at, check, prune, export and import a store of caches."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

from . import output

_LINES = 50
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}I": 1024**power for power, name in enumerate("KMGT", start=1)}


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "store",
        parents=[common],
        help="look at, check, prune, export or import a store of caches",
        description="stat     what is in it: records, bytes, limit, what made them\n"
        "verify   read every record with every check; status 1 where one is bad\n"
        "prune    remove the records used longest ago, down to --max-bytes\n"
        "export   write each record as FOLDER/KEY.safetensors\n"
        "import   take in a folder that export wrote; makes the store where it is not there",
        epilog="examples:\n  voco store stat caches.store\n  voco store verify caches.store --delete\n"
        "  voco store prune caches.store --max-bytes 20GB\n  voco store export caches.store files/\n"
        "  voco store import other.store files/\n",
    )
    parser.add_argument("action", choices=tuple(_ACTIONS), metavar="ACTION", help=" | ".join(_ACTIONS))
    parser.add_argument("store", metavar="STORE", help="the folder of the store")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="of the files (export, import)")
    parser.add_argument(
        "--max-bytes", type=size, metavar="SIZE", help="what may stay (prune): 500MB, 20GB, 4GiB or bytes"
    )
    parser.add_argument("--delete", action="store_true", help="remove the bad records (verify)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def size(text: str) -> int:
    """``20GB`` → 20000000000, ``4GiB`` → 4294967296."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB, 20GB, 4GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def run(args: argparse.Namespace) -> int:
    for option, action in (("max_bytes", "prune"), ("delete", "verify")):
        if getattr(args, option) not in (None, False) and args.action != action:
            raise ValueError(f"--{option.replace('_', '-')} is for `voco store {action}`, not {args.action}.")
    if (args.folder is not None) != (args.action in ("export", "import")):
        wants = "needs" if args.folder is None else "takes no"
        raise ValueError(f"`voco store {args.action}` {wants} FOLDER.")
    return int(_ACTIONS[args.action](args))


def _stat(args: argparse.Namespace) -> int:
    from ..store import VoCoCacheStore

    with VoCoCacheStore(args.store, readonly=True) as store:
        facts = store.stat()
    if args.json:
        output.emit_json(facts)
        return 0
    limit = facts["max_bytes"]
    output.emit(
        f"{facts['records']} record(s), {output.human_bytes(facts['bytes'])}"
        + (f" of at most {output.human_bytes(limit)}" if limit is not None else ", no limit")
        + f"; file {output.human_bytes(facts['file_bytes'])}; values: {facts['values']}"
    )
    if facts["values"] == "int8":
        output.emit(_error_line(facts["error"]))
    output.emit(output.table(sorted(facts["fingerprint"].items()), ("made by", "")))
    return 0


def _error_line(error: dict[str, Any] | None) -> str:
    if not error:
        return "error of 8 bits: not measured (voco_plugin.store.quantization_error, store.note_error)"
    return (
        f"error of 8 bits, over {error.get('tokens')} tokens: logits differ by at most "
        f"{error.get('max_abs_logit', 0):.4f}, on average {error.get('mean_abs_logit', 0):.5f}; "
        f"{100 * error.get('greedy_agreement', 0):.2f} % of the greedy tokens are the same"
    )


def _verify(args: argparse.Namespace) -> int:
    from ..store import VoCoCacheStore
    from ..store.pages import damaged_pages

    pages = damaged_pages(args.store)
    if pages:  # a process that writes can look like damage: what is wrong twice is wrong
        time.sleep(0.5)
        pages = damaged_pages(args.store)
    found: dict[str, Any] = {"records": 0, "bytes": 0, "bad": [], "index": [], "pages": pages, "deleted": 0}
    if not pages:  # LMDB trusts the pages; it is not let near damaged ones
        with (
            VoCoCacheStore(args.store, readonly=not args.delete) as store,
            output.progress(total=len(store), unit="record", quiet=args.json) as bar,
        ):
            found |= store.verify(bar.update)
            if args.delete:
                found["deleted"] = store.delete(bad["key"] for bad in found["bad"])
    faults = [bad["reason"] for bad in found["bad"]] + found["index"]
    faults += [f"database file: {line}" for line in pages or ()]
    if args.json:
        output.emit_json(found)
    else:
        for line in faults[:_LINES]:
            output.emit(line)
        if len(faults) > _LINES:
            output.emit(f"… and {len(faults) - _LINES} more (--json lists all)")
        if pages:
            output.emit("records were not read; restore the folder from a copy, or compress again.")
        else:
            output.emit(
                f"{found['records']} record(s), {output.human_bytes(found['bytes'])}: "
                + (f"{len(faults)} fault(s), {found['deleted']} removed" if faults else "all whole")
                + ("" if pages is not None else "; the file's pages were not checked (needs lmdb >= 3.0)")
            )
    return 1 if faults else 0


def _prune(args: argparse.Namespace) -> int:
    from ..store import VoCoCacheStore

    if args.max_bytes is None:
        raise ValueError("`voco store prune` needs --max-bytes: what may stay.")
    with VoCoCacheStore(args.store) as store:
        removed = store.prune(args.max_bytes)
        facts = store.stat()
    result = {"removed": removed, "records": facts["records"], "bytes": facts["bytes"]}
    if args.json:
        output.emit_json(result)
    else:
        output.emit(
            f"{removed} record(s) removed; {facts['records']} stay, {output.human_bytes(facts['bytes'])} "
            "(the file keeps its size: new records use the room)"
        )
    return 0


def _export(args: argparse.Namespace) -> int:
    from ..store import VoCoCacheStore

    with VoCoCacheStore(args.store, readonly=True) as store:
        count = store.export(Path(args.folder).expanduser())
    _counted(args, "exported", count, f"→ {args.folder}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from ..store import VoCoCacheStore
    from ..store.transfer import maker_of

    folder = Path(args.folder).expanduser()
    made: dict[str, Any] = {} if (Path(args.store) / "data.mdb").exists() else maker_of(folder)
    with VoCoCacheStore(args.store, **made) as store:
        count = store.import_(folder)
    _counted(args, "imported", count, "(those that were there already are not counted)")
    return 0


def _counted(args: argparse.Namespace, what: str, count: int, more: str) -> None:
    if args.json:
        output.emit_json({what: count})
    else:
        output.emit(f"{count} record(s) {what} {more}")


_ACTIONS = {"stat": _stat, "verify": _verify, "prune": _prune, "export": _export, "import": _import}
