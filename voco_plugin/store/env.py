"""The LMDB environment below a store: one per folder and process, shared, reopened after a fork, grown when
full.

LMDB forbids opening a folder twice in a process, using it across a fork, and moving its memory map while a
transaction reads from it; this module keeps those three rules, so that a store need not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..cache.container import VoCoCacheError

T = TypeVar("T")

MAP_SIZE = 1 << 38
"""Bytes of address space that a store maps at first (256 GiB). The file is as large as its content."""

_SMALLEST_MAP = 1 << 26
_MAX_READERS = 1024
_LOCK_BYTES = 64 * _MAX_READERS + 4096  # LMDB takes 64 bytes a reader, and takes a larger file as it is
_WAIT_SECONDS = 60.0
DATABASES = ("meta", "blocks", "facts", "recent")

_lock = threading.Lock()
_open: dict[tuple[int, int], Environment] = {}
_fork_hook = False


def _after_fork() -> None:
    """A child forgets its parent's environments. It must not close them, nor end their transactions: that
    would free the parent's places in the table of readers. Dropped in another process, py-lmdb's objects do
    nothing.
    """
    global _lock
    _lock = threading.Lock()
    for environment in _open.values():
        environment.env, environment.dbs = None, {}
    _open.clear()


def acquire(path: Path, *, readonly: bool, map_size: int, lock: bool) -> Environment:
    """The environment of ``path`` in this process, opened where it is not; give it back with
    :meth:`Environment.release`.

    Raises:
        VoCoCacheError: the folder holds something else than LMDB, or a damaged file.
        OSError: it cannot be read, written or locked; the disk is full.
    """
    global _fork_hook
    with _lock:
        if not _fork_hook:
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork)
            _fork_hook = True
        identity = _identity(path)
        found = _open.get(identity) if identity else None
        if found is None:
            found = Environment(path, readonly=readonly, map_size=map_size, lock=lock)
            identity = _identity(path)
            assert identity is not None
            found.identity = identity
            _open[identity] = found
        elif (found.readonly and not readonly) or (lock and not found.lock):
            found.open_anew(readonly=readonly and found.readonly, lock=True)
        found.refs += 1
        return found


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = os.stat(path / "data.mdb")
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino


def _allocate_lock(path: Path) -> None:
    """Give ``lock.mdb`` its blocks on the disk before LMDB maps it: it is a file with holes, and a reader
    that wrote into a hole on a full disk would be ended by SIGBUS.

    Raises:
        OSError: the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        handle = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return  # LMDB has its own answers to a lock that cannot be written
    try:
        # one that is in use must not grow below those who have mapped it
        os.posix_fallocate(handle, 0, os.fstat(handle).st_size or _LOCK_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno, f"the disk of store {path} has no room for its lock.mdb; make some"
            ) from None
    finally:
        os.close(handle)


class Environment:
    """One LMDB environment of this process.

    Attributes:
        dbs: handles of :data:`DATABASES`; empty where the folder is not a store yet.
        pid: the process it belongs to.
    """

    def __init__(self, path: Path, *, readonly: bool, map_size: int, lock: bool) -> None:
        self.path, self.readonly, self.lock = path, readonly, lock
        self.identity: tuple[int, int] | None = None
        self._folder = Path(os.path.abspath(path))  # where it is, wherever the process goes
        self.pid, self.refs = os.getpid(), 0
        self._writing = threading.Lock()  # LMDB lets processes wait for each other, not always threads
        self._changed = threading.Condition()
        self._changing = False
        self._inside: dict[int, int] = {}  # thread → transactions it has open
        self._open(map_size)

    def _open(self, map_size: int) -> None:
        import lmdb

        if self.lock:
            _allocate_lock(self.path)
        with self._translated_errors():
            while True:
                try:
                    self.env: Any = lmdb.open(
                        str(self.path), map_size=map_size, readonly=self.readonly, lock=self.lock, max_dbs=8,
                        max_readers=_MAX_READERS, create=not self.readonly, readahead=False, mode=0o666,
                        # one kept for reuse would, when a forked child drops it, free the parent's place
                        max_spare_txns=0,
                    )  # fmt: skip
                    break
                except lmdb.MemoryError:  # a limit on the address space (ulimit -v)
                    map_size //= 2
                    if map_size < _SMALLEST_MAP:
                        raise
            self.dbs: dict[str, Any] = {}
            self.open_databases(create=False)

    def open_databases(self, create: bool) -> bool:
        """Open :data:`DATABASES`; whether they are all there."""
        import lmdb

        try:
            with self._translated_errors():
                self.dbs = {name: self.env.open_db(name.encode(), create=create) for name in DATABASES}
        except (lmdb.NotFoundError, lmdb.ReadonlyError):
            self.dbs = {}
        return bool(self.dbs)

    def open_anew(self, *, readonly: bool, lock: bool) -> None:
        """Close it and open it for more; waits for this process's transactions to end. Where that fails, it
        is what it was.
        """
        with self._exclusive("opened anew"):
            before, size = (self.readonly, self.lock), self.env.info()["map_size"]
            self.env.close()
            self.readonly, self.lock = readonly, lock
            try:
                self._open(size)
            except BaseException:
                self.readonly, self.lock = before
                self._open(size)
                raise

    def release(self) -> None:
        """Give it back; the last one closes it."""
        if self.pid != os.getpid():
            return
        with _lock:
            if self.refs == 1 and self._inside:
                raise VoCoCacheError(
                    f"store {self.path} cannot be closed while a view of it is open; leave the view's block "
                    "first."
                )
            self.refs -= 1
            if self.refs == 0:
                if self.identity is not None and _open.get(self.identity) is self:
                    del _open[self.identity]
                self.env.close()

    # -- transactions

    @contextlib.contextmanager
    def read(self) -> Iterator[Any]:
        """A snapshot; what it reads stays as it is until the block ends, whoever writes."""
        with self._translated_errors():
            txn = self._begin(write=False)
        try:
            with self._translated_errors():
                yield txn
        finally:
            if self.pid == os.getpid():  # else a child leaves its parent's view
                txn.abort()
                self._leave()

    def write(self, work: Callable[[Any], T]) -> T:
        """``work(transaction)`` committed, or nothing of it. It is called again where the map had to grow."""
        import lmdb

        while True:
            with self._writing, self._translated_errors():
                self.env.reader_check()  # a reader that was killed would keep freed pages from being used
                txn = self._begin(write=True)
                try:
                    result = work(txn)
                    txn.commit()
                except lmdb.MapFullError:
                    txn.abort()
                    full = True
                except BaseException:
                    txn.abort()
                    raise
                else:
                    full = False
                finally:
                    self._leave()
            if not full:
                self._check_there()
                return result
            self.grow()

    def grow(self) -> None:
        """Twice the memory map, or what another process has grown it to."""
        with self._exclusive("grown"):
            before = self.env.info()["map_size"]
            self.env.set_mapsize(0)  # what the file says by now
            if self.env.info()["map_size"] <= before:
                self.env.set_mapsize(2 * before)

    def _begin(self, write: bool) -> Any:
        import lmdb

        self._check_there()
        cleared = False
        while True:
            self._enter()
            try:
                return self.env.begin(write=write, buffers=True)
            except lmdb.MapResizedError:
                self._leave()
                with self._exclusive("grown"):
                    self.env.set_mapsize(0)
            except lmdb.ReadersFullError:
                self._leave()
                if cleared or not self.env.reader_check():
                    raise
                cleared = True
            except BaseException:
                self._leave()
                raise

    def _check_there(self) -> None:
        """A folder that was deleted can be read and written while it is open, and all of that is lost then.

        Raises:
            VoCoCacheError: the database is not where it was opened.
        """
        if self.identity is not None and _identity(self._folder) != self.identity:
            raise VoCoCacheError(
                f"store {self.path} was deleted, moved or replaced while it was open; what is written to it "
                "now would be lost. Open it again."
            )

    def _enter(self) -> None:
        me = threading.get_ident()
        with self._changed:
            # a thread that is inside may go deeper: who waits to change the map waits for it
            while self._changing and not self._inside.get(me):
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def _leave(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
            self._changed.notify_all()

    @contextlib.contextmanager
    def _exclusive(self, what: str) -> Iterator[None]:
        """No transaction of this process is open inside the block."""
        with self._changed:
            if threading.get_ident() in self._inside:
                raise VoCoCacheError(
                    f"the store {self.path} must be {what}, but this thread has a view of it open; leave the "
                    "view's block first."
                )
            free = self._changed.wait_for(lambda: not self._changing, _WAIT_SECONDS)
            if free:
                self._changing = True
                free = self._changed.wait_for(lambda: not self._inside, _WAIT_SECONDS)
            if not free:
                self._changing = False
                self._changed.notify_all()
                raise VoCoCacheError(
                    f"the store {self.path} must be {what}, but another thread has kept a view of it open "
                    f"for {_WAIT_SECONDS:.0f} s; let it leave the view's block."
                )
        try:
            yield
        finally:
            with self._changed:
                self._changing = False
                self._changed.notify_all()

    # -- errors

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """LMDB's errors, but those handled here, become ``OSError`` or ``VoCoCacheError`` with a reason."""
        import lmdb

        try:
            yield
        except (lmdb.MapFullError, lmdb.NotFoundError):
            raise
        except lmdb.DiskError:
            raise OSError(
                errno.ENOSPC, f"the disk of store {self.path} is full; nothing of this write was kept"
            ) from None
        except lmdb.ReadonlyError:
            what = (
                "its lock.mdb cannot be locked; ask for permission to write to lock.mdb, or open it with "
                "lock=False while nobody writes"
                if self.readonly
                else "the folder or its files are read-only; open it with readonly=True"
            )
            raise PermissionError(errno.EACCES, f"store {self.path} cannot be opened: {what}") from None
        except lmdb.LockError as error:
            raise OSError(errno.EAGAIN, f"store {self.path} cannot be locked ({error})") from None
        except lmdb.ReadersFullError:
            raise OSError(
                errno.EAGAIN, f"store {self.path} has {_MAX_READERS} readers at once; close some"
            ) from None
        except lmdb.MemoryError:
            raise OSError(
                errno.ENOMEM, f"store {self.path} cannot be mapped into memory; raise the limit (ulimit -v)"
            ) from None
        except (
            lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError,
            lmdb.PanicError, lmdb.IncompatibleError,
        ) as error:  # fmt: skip
            raise VoCoCacheError(f"{self.path} is no VoCo store, or a damaged one ({error}).") from None
        except lmdb.Error as error:
            if "already open in this process" in str(error):
                # held by a transaction of the parent; or by a store that was opened where this one is now
                # (lmdb before 3.0 goes by paths alone)
                raise VoCoCacheError(
                    f"store {self.path} is open in this process already: it was forked inside the block of a "
                    "view (leave that block before using the store), or the store that was there before is "
                    "still open (close it)."
                ) from None
            if "Input/output error" in str(error):  # how LMDB calls a write that was cut short
                raise OSError(
                    errno.EIO, f"store {self.path} could not be read or written: a full disk, a limit on the "
                    "size of files, or a faulty disk; nothing of this write was kept",
                ) from None  # fmt: skip
            raise OSError(f"store {self.path}: {error}") from None
