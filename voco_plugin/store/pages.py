"""The database file below a store, looked at without LMDB, which trusts its pages: a damaged or cut file may
end the process that opens it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from ..cache.container import VoCoCacheError

# A meta page of LMDB 0.9: page header of 16 bytes; magic, version, address, map size; two databases of 48
# bytes (the first begins with the page size); last page, transaction
_META = struct.Struct("=16xII8x8xI44x48xQQ")
_MAGIC = 0xBEEFC0DE


def damaged_pages(path: str | os.PathLike) -> list[str] | None:
    """What is wrong with the pages of a store. A process that writes meanwhile can look like damage.

    Returns:
        one line per fault; ``None`` where the installed lmdb package cannot tell (before 3.0).

    Raises:
        FileNotFoundError: there is no store.
        VoCoCacheError: the file is not an LMDB file.
    """
    file = Path(path) / "data.mdb"
    if not file.is_file():
        raise FileNotFoundError(f"there is no store at {path}.")
    try:
        from lmdb import verify as pages
    except ImportError:
        return None
    try:
        return list(pages.verify(str(file), subdir=False))
    except pages.VerifyError as error:
        raise VoCoCacheError(f"{path} is no VoCo store, or a damaged one ({error}).") from None


def check_length(path: Path) -> None:
    """Refuse a database file that was cut: reading past its end would end the process.

    Raises:
        VoCoCacheError: pages that hold something are missing.
    """
    file = path / "data.mdb"
    try:
        with open(file, "rb") as stream:
            first = stream.read(_META.size)
            size = os.fstat(stream.fileno()).st_size
            if size == 0 or not first:
                return  # a process died while it made the store, or is making it
            if len(first) < _META.size or _META.unpack(first)[0] != _MAGIC:
                raise VoCoCacheError(f"{path} is no VoCo store: data.mdb is no LMDB file.")
            page_size = _META.unpack(first)[2]
            stream.seek(page_size)
            second = stream.read(_META.size)
    except FileNotFoundError:
        return
    metas = [_META.unpack(raw) for raw in (first, second) if len(raw) == _META.size]
    last_page = max(metas, key=lambda meta: meta[4])[3]
    if size >= (last_page + 1) * page_size:
        return
    # a page at the end that was freed before it was written may rightly be missing, so look closer; twice,
    # since a process that writes meanwhile can look like damage
    faults = damaged_pages(path) and damaged_pages(path)
    if faults:
        raise VoCoCacheError(
            f"the database file of store {path} was cut ({faults[0]}); restore it from a copy, or compress "
            "again."
        )
