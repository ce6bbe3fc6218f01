"""The file of a session: the container of a cache, with the KV cache of the whole conversation in it.

layers.{l}.key, layers.{l}.value       (H, S, D), every slot that has been read
waiting.layers.{l}.key, …value         (T, H, D), images that wait for the next question, as in a cache file
metadata["voco"]                       JSON: messages, unread ids, what each slot holds, fingerprint
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache import VoCoBlock, VoCoCacheError
from ..cache import file_format as files
from ..cache.container import Contents, parse, to_chunks
from ..cache.file_format import BLOCK_FIELDS, check_record
from ..cache.fingerprint import differences_to_reader
from ..core.kv_cache import KVSlots, VoCoKVCache
from ..core.layout import TokenKind
from ..core.masks import TokenTable
from ..files import atomic_path

FORMAT = "session-1"
_TABLE = ("kind", "block", "order")
_COUNTS = ("next_position", "next_order", "num_blocks")
_WAITING = "waiting."


@dataclass(frozen=True)
class SavedSession:
    """What is saved of a :class:`~voco_plugin.inference.session.VoCoSession`.

    Attributes:
        messages: the conversation so far.
        num_tokens: K of its images; ``None``: the model's.
        past: the KV cache of what has been read (a ``DynamicCache`` of one row), or ``None``.
        unread: ids of the conversation that are not in ``past`` yet.
        waiting: blocks of the images for the next question.
    """

    messages: list[dict[str, Any]]
    num_tokens: int | None
    past: Any
    unread: tuple[int, ...]
    waiting: Sequence[VoCoBlock]


def write_session(path: str | os.PathLike, session: SavedSession, fingerprint: dict[str, Any]) -> None:
    """Write ``session`` atomically.

    Args:
        fingerprint: what its KV cache was made by.
    """
    tensors = {f"{_WAITING}{n}": t for n, t in files.block_tensors(session.waiting).items()}
    past, slots = session.past, None
    if past is not None:
        for index, layer in enumerate(past.layers):
            tensors[f"layers.{index}.key"] = layer.keys[0].detach().cpu()
            tensors[f"layers.{index}.value"] = layer.values[0].detach().cpu()
        held = KVSlots.of(past)
        assert held is not None
        held.check(past.get_seq_length(), 1)
        slots = {
            **{name: getattr(held.table, name)[0].tolist() for name in _TABLE},
            **{name: int(getattr(held, name)[0]) for name in _COUNTS},
            "settled": held.open_to_text,
        }
    record = {
        "format_version": FORMAT,
        "fingerprint": fingerprint,
        "messages": session.messages,
        "num_tokens": session.num_tokens,
        "unread": list(session.unread),
        "slots": slots,
        "waiting": [{f: getattr(b, f) for f in BLOCK_FIELDS} for b in session.waiting],
    }
    facts = [(n, t.dtype, tuple(t.shape), files.bytes_of(t)) for n, t in tensors.items()]
    metadata = {"voco": json.dumps(record, sort_keys=True), "sha256": files.digest(facts, record)}
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        for chunk in to_chunks(tensors, metadata):
            stream.write(chunk)


def read_session(path: str | os.PathLike, fingerprint: dict[str, Any], device: torch.device) -> SavedSession:
    """The session in a file, its KV cache on ``device``, after every check.

    Args:
        fingerprint: what it must have been made by.

    Raises:
        VoCoCacheError: no session file, changed since it was written, or of another model or rule.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    view = memoryview(path.read_bytes())
    contents = parse(view, str(path))
    record = _record(contents, view, str(path))
    wrong = differences_to_reader(fingerprint, record["fingerprint"])
    if wrong:
        raise VoCoCacheError(
            f"{path} was not made by this model under this rule; load the model that made it: "
            f"{'; '.join(wrong)}."
        )
    tensors, _ = files.tensors_of(view, contents, copy=True)
    try:
        past = _past(tensors, record["slots"], device)
        waiting = {n.removeprefix(_WAITING): t for n, t in tensors.items() if n.startswith(_WAITING)}
        found = files.blocks_of(waiting, {"blocks": record["waiting"]}, copy=True)
        blocks = [VoCoBlock(**fields) for fields in found]
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise VoCoCacheError(f"{path}: tensors and metadata do not match ({error}).") from None
    if past is not None:
        past.voco_made_by = record["fingerprint"]
    unread = tuple(record["unread"])
    return SavedSession(record["messages"], record["num_tokens"], past, unread, blocks)


def _record(contents: Contents, view: memoryview, where: str) -> dict[str, Any]:
    try:
        record = json.loads(contents.metadata["voco"])
    except (ValueError, RecursionError):
        raise VoCoCacheError(f"{where} is not a session: its metadata cannot be read.") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT:
        raise VoCoCacheError(f"{where} is not a session of this release: its format is {str(version)[:20]}.")
    facts = [(n, e.dtype, e.shape, view[e.start : e.stop]) for n, e in contents.entries.items()]
    if files.digest(facts, record) != contents.metadata["sha256"]:
        raise VoCoCacheError(f"{where} was changed since it was written: its checksum does not match.")
    fields: dict[str, Any] = {
        "fingerprint": dict, "messages": list, "unread": list, "waiting": list,
        "slots": (dict, type(None)), "num_tokens": (int, type(None)),
    }  # fmt: skip
    for name, kind in fields.items():
        if not isinstance(record.get(name), kind):
            raise VoCoCacheError(f"{where}: {name} is no {kind}.")
    whole = {
        "format_version": files.FORMAT_VERSION, "blocks": record["waiting"], "num_rows": 1,
        "rows": [0] * len(record["waiting"]), "fingerprint": record["fingerprint"],
    }  # fmt: skip
    check_record(whole, where)
    if not all(type(token) is int and token >= 0 for token in record["unread"]):
        raise VoCoCacheError(f"{where}: unread holds what is no token id.")
    return record


def _past(tensors: dict[str, torch.Tensor], slots: Any, device: torch.device) -> Any:
    """The KV cache and what its slots hold."""
    layers = sum(name.startswith("layers.") for name in tensors) // 2
    if slots is None:
        if layers:
            raise ValueError("keys without slots")
        return None
    past: Any = VoCoKVCache()
    for index in range(layers):
        key, value = (tensors[f"layers.{index}.{name}"].to(device) for name in ("key", "value"))
        if key.dim() != 3 or value.dim() != 3 or key.shape[1] != value.shape[1]:
            raise ValueError(f"layer {index} has shapes {tuple(key.shape)} and {tuple(value.shape)}")
        past.update(key[None], value[None], index)
    lengths = {layer.keys.shape[2] for layer in past.layers} | {len(slots[name]) for name in _TABLE}
    if len(lengths) != 1 or not set(slots["kind"]) <= {TokenKind.PAD, TokenKind.TEXT, TokenKind.VOCO}:
        raise ValueError("slots and keys are not of one length, or a slot holds what no session reads")
    kind, block, order = (torch.tensor([slots[name]], dtype=torch.long, device=device) for name in _TABLE)
    table = TokenTable(kind, block, order)
    counts: dict[str, Any] = {name: torch.tensor([int(slots[name])], device=device) for name in _COUNTS}
    past.voco_slots = KVSlots(table, open_to_text=bool(slots["settled"]), **counts)
    return past
