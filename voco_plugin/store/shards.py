"""Caches as Parquet shards, for object stores and other programs: written and read through fsspec.

    PREFIX/CONTENT-HASH.parquet     rows of one shard; it is there whole, or not at all
    PREFIX/manifest.json            at the end of a run: the shards, their sizes, and whose caches they are

    column                                          a row is one image name
    name, key, stamp                                text; key: 64 hex digits, stamp: of the source, or null
    K                                               VoCo tokens
    num_vision, extent, position, order, relocatable, dtype, layers, heads, head_dim       of the block
    cache                                           bytes of the file that VoCoCache.save writes; null where
                                                    an earlier row of this prefix holds those of its key

A shard is made in memory and put in one go (an object store makes that atomic; a local one is written beside
its place and renamed; elsewhere under a temporary name, then moved). Its name is the hash of its bytes, so
writing it twice is writing it once. The shards say themselves what is finished: a job that is started again
reads their columns of names and keys, and needs no manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..cache.cache import VoCoCache, cache_from_buffer, cache_to_bytes
from ..cache.container import VoCoCacheError
from ..cache.fingerprint import differences
from .names import NameEntry
from .shard_folder import MANIFEST, ShardFolder

FORMAT_VERSION = 1
SHARD_BYTES = 1 << 28
"""A shard is written when its caches take so much, in bytes."""

_METADATA = b"voco"
_NAMES = ("name", "K", "key", "stamp")
_FACTS = ("num_vision", "extent", "position", "order", "relocatable")
_KEY = re.compile(r"[0-9a-f]{64}")


class ShardItem(NamedTuple):
    """A row of a shard that holds a cache."""

    name: str
    key: str
    cache: VoCoCache


class ShardWriter:
    """Collects rows and writes shards.

    Args:
        folder: where to.
        fingerprint: of the caches; those already there must be of the same.
        shard_bytes: size at which a shard is written.
    """

    def __init__(
        self, folder: ShardFolder, fingerprint: dict[str, Any], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.fingerprint, self.shard_bytes = folder, fingerprint, shard_bytes
        self.rows: list[dict[str, Any]] = []
        self.bytes_waiting = 0
        self.bytes_written = 0

    def add(self, entry: NameEntry, cache: VoCoCache | None) -> None:
        """A row; ``cache`` is ``None`` where an earlier row of this prefix holds the cache of its key."""
        row: dict[str, Any] = {
            "name": entry.name, "key": entry.key, "stamp": entry.stamp, "K": entry.num_tokens, "cache": None,
        }  # fmt: skip
        if cache is not None:
            row |= {**_facts(cache), "cache": cache_to_bytes(cache)}
            self.bytes_waiting += len(row["cache"])
        self.rows.append(row)
        if self.bytes_waiting >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected as one shard, if anything."""
        if not self.rows:
            return
        data = _parquet(self.rows, self.fingerprint)
        self.folder.put(f"{hashlib.sha256(data).hexdigest()}.parquet", data)
        self.bytes_written += len(data)
        self.rows, self.bytes_waiting = [], 0


def read_shards(url: str) -> Iterator[ShardItem]:
    """The caches of all shards under ``url``; each key once, under the first name it comes with.

    Raises:
        VoCoCacheError: a shard is damaged, was changed, is of another format, or is missing although the
            manifest names it.
        FileNotFoundError: there are no shards.
    """
    folder = ShardFolder(url)
    names = folder.shards()
    listed = (folder.manifest() or {"shards": {}})["shards"]
    lost = sorted(set(listed) - set(names))
    if lost:
        raise VoCoCacheError(f"{url}: {len(lost)} shard(s) of its manifest are missing, {lost[0]} first.")
    if not names:
        raise FileNotFoundError(f"{url} holds no shards.")
    seen: set[str] = set()
    for name in names:
        for item in read_shard(folder.get(name), f"{url}/{name}", name.removesuffix(".parquet")):
            if item.key not in seen:
                seen.add(item.key)
                yield item


def read_shard(data: bytes, where: str, sha256: str | None = None) -> list[ShardItem]:
    """The caches of one shard.

    Args:
        data: all its bytes.
        where: what it is called in messages.
        sha256: what its bytes must hash to (its name).

    Raises:
        VoCoCacheError: see :func:`read_shards`.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise VoCoCacheError(f"{where} was changed since it was written: its hash is not its name.")
    table = _table(io.BytesIO(data), where, None, len(data))
    fingerprint = _metadata(table.schema, where)["fingerprint"]
    rows = _checked_rows(table, where)
    return [_item(row, fingerprint, where) for row in rows if row["cache"] is not None]


def shard_names(folder: ShardFolder) -> Iterator[tuple[NameEntry, dict[str, Any]]]:
    """Every row's name and key, with the fingerprint of its shard; the caches are not read.

    Raises:
        VoCoCacheError: a shard is damaged or of another format.
    """
    for name in folder.shards():
        where = f"{folder.url}/{name}"
        with folder.fs.open(folder.path(name), "rb") as stream:
            table = _table(stream, where, list(_NAMES), folder.fs.size(folder.path(name)))
        fingerprint = _metadata(table.schema, where)["fingerprint"]
        for row in _checked_rows(table, where):
            yield NameEntry(row["name"], row["K"], row["key"], row["stamp"]), fingerprint


def write_manifest(folder: ShardFolder) -> dict[str, Any]:
    """Write ``manifest.json`` over the shards that are there, and return it.

    Raises:
        VoCoCacheError: a shard is damaged, or they are of different models.
    """
    import pyarrow.parquet as pq

    found: dict[str, Any] = {"format_version": FORMAT_VERSION, "fingerprint": None, "shards": {}}
    for name in folder.shards():
        where = f"{folder.url}/{name}"
        with folder.fs.open(folder.path(name), "rb") as stream, _translated_errors(where):
            facts = pq.read_metadata(stream)
        fingerprint = _metadata(facts.schema.to_arrow_schema(), where)["fingerprint"]
        found["fingerprint"] = found["fingerprint"] or fingerprint
        check_same_maker(found["fingerprint"], fingerprint, where)
        size = int(folder.fs.size(folder.path(name)))
        found["shards"][name] = {"bytes": size, "rows": facts.num_rows}
    folder.put(MANIFEST, json.dumps(found, indent=1, sort_keys=True).encode())
    return found


def check_same_maker(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raises VoCoCacheError where shards were made by another model, adapter, processor or rule."""
    wrong = differences(expected, found)
    if wrong:
        raise VoCoCacheError(f"{where} was not made by this model; give another prefix: {'; '.join(wrong)}.")


def _facts(cache: VoCoCache) -> dict[str, Any]:
    (block,) = cache.blocks
    heads, _, width = block.keys[0].shape
    return {
        **{name: getattr(block, name) for name in _FACTS},
        "dtype": str(block.dtype).removeprefix("torch."), "layers": block.num_layers, "heads": heads,
        "head_dim": width,
    }  # fmt: skip


def names_hash(rows: Iterable[dict[str, Any]]) -> str:
    """sha256 over the names and keys of rows: they are read without the rest, whose hash is the shard's
    name."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps([row[name] for name in _NAMES]).encode() + b"\n")
    return sha.hexdigest()


def _schema(fingerprint: dict[str, Any], names: str) -> Any:
    import pyarrow as pa

    record = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "names": names}
    number = {name: pa.int64() for name in ("num_vision", "extent", "position", "order", "layers", "heads")}
    return pa.schema(
        [
            pa.field("name", pa.string(), nullable=False), pa.field("key", pa.string(), nullable=False),
            ("stamp", pa.string()), pa.field("K", pa.int64(), nullable=False), *number.items(),
            ("head_dim", pa.int64()), ("relocatable", pa.bool_()), ("dtype", pa.string()),
            ("cache", pa.large_binary()),
        ],
        metadata={_METADATA: json.dumps(record, sort_keys=True).encode()},
    )  # fmt: skip


def _parquet(rows: list[dict[str, Any]], fingerprint: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    # keys and values of 16 and 32 bits do not compress, and nothing then claims to be larger than it is
    pq.write_table(
        pa.Table.from_pylist(rows, schema=_schema(fingerprint, names_hash(rows))), out, compression="none",
        use_dictionary=False, row_group_size=256,
    )  # fmt: skip
    return out.getvalue()


def _table(stream: Any, where: str, columns: list[str] | None, size: int) -> Any:
    """The columns asked for, after checks of the format and of what the shard claims to hold."""
    import pyarrow.parquet as pq

    with _translated_errors(where):
        file = pq.ParquetFile(stream)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        claimed = sum(g.column(i).total_uncompressed_size for g in groups for i in range(g.num_columns))
        if claimed > size or file.metadata.num_rows > size:
            raise VoCoCacheError(f"{where} claims {claimed} bytes of columns in a file of {size}.")
        record = _metadata(file.schema_arrow, where)
        if not file.schema_arrow.equals(_schema(record["fingerprint"], record["names"])):
            raise VoCoCacheError(f"{where} has other columns than a shard of caches.")
        return file.read(columns)


@contextlib.contextmanager
def _translated_errors(where: str) -> Iterator[None]:
    """pyarrow's errors on a damaged file become VoCoCacheError."""
    import pyarrow as pa

    try:
        yield
    except VoCoCacheError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as problem:
        text = " ".join(str(problem).split())[:200]
        raise VoCoCacheError(f"{where} is no Parquet file that can be read: {text}.") from None


def _metadata(schema: Any, where: str) -> dict[str, Any]:
    try:
        record = json.loads((schema.metadata or {})[_METADATA])
        version, fingerprint, _ = record["format_version"], record["fingerprint"], record["names"]
    except (KeyError, ValueError, TypeError):
        raise VoCoCacheError(f"{where} is a Parquet file but no shard of VoCo caches.") from None
    if version != FORMAT_VERSION or not isinstance(fingerprint, dict):
        raise VoCoCacheError(f"{where} has format version {version}; this release reads {FORMAT_VERSION}.")
    return record


def _checked_rows(table: Any, where: str) -> list[dict[str, Any]]:
    """The rows, after checks of their names and keys."""
    rows = table.to_pylist()
    if names_hash(rows) != _metadata(table.schema, where)["names"]:
        raise VoCoCacheError(f"{where}: its names and keys were changed since it was written.")
    for row in rows:
        if not _KEY.fullmatch(row["key"]) or row["K"] < 1:
            raise VoCoCacheError(f"{where} holds a row whose key is none.")
    return rows


def _item(row: dict[str, Any], fingerprint: dict[str, Any], where: str) -> ShardItem:
    cache = cache_from_buffer(row["cache"], f"{where}, image {row['name'][:200]!r}")
    if len(cache) != 1 or cache.num_tokens != [row["K"]]:
        raise VoCoCacheError(f"{where}: the cache of {row['name'][:200]!r} is not of one image of K tokens.")
    facts = _facts(cache)
    wrong = [name for name, value in facts.items() if row[name] != value]
    if wrong or cache.fingerprint != fingerprint:
        what = ", ".join(wrong) or "fingerprint"
        raise VoCoCacheError(f"{where}: {what} of {row['name'][:200]!r} is not that of its cache.")
    return ShardItem(row["name"], row["key"], cache)
