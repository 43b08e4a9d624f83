"""The file below a ledger: SQLite, one process at a time, each write on the disk before it returns."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from lightning_ppdl.errors import ConfigurationError, LedgerError, LedgerLockedError, LedgerWriteError
from lightning_ppdl.privacy.lock import PathLock

_APPLICATION = 0x7070646C
"""SQLite's mark of whose file it is: "ppdl"."""
_VERSION = 1
"""Of the schema; an older package must not pass over what a later one wrote."""
_REMEDIES = {
    "full": "the disk or the quota is full: free space, then go on",
    "permission": "there is no permission to read and write it, the .lock beside it and their directory: run "
    "as the user whom they belong to, or give the ledger another path",
    "read-only": "it is read-only: every release is entered before it is sent, so the file and its directory "
    "must be writable",
    "in use": "it is in use by another program or under another name: end that one",
    "disk": "free space or mend the disk, then go on",
}


class LedgerFile:
    """Transactions on the file at ``path``, or in memory for None. Thread-safe; not for forked children.

    Args:
        path: Made if missing.
        schema: SQL statements that make the tables of a new file.
    """

    def __init__(self, path: str | Path | None, schema: str) -> None:
        # Another name of the same file must find the same lock.
        self.path = None if path is None else Path(path).resolve()
        if self.path is not None and not self.path.parent.is_dir():
            raise ConfigurationError(
                f"ledger={str(path)!r}: there is no directory {self.path.parent}; make it first"
            )
        if self.path is not None and self.path.is_dir():
            raise ConfigurationError(f"ledger={str(path)!r} is a directory; name a file in it")
        self._guard = RLock()
        self._process = os.getpid()
        self._closed = False
        self._inode: int | None = None
        self._lock: PathLock | None = None
        self._database: sqlite3.Connection | None = None
        try:
            if self.path is not None:
                self._lock = PathLock(self.path)
                # Its owner's alone: it tells who learnt what together with whom, and when.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = sqlite3.connect(
                self.path or ":memory:", timeout=1.0, isolation_level=None, check_same_thread=False
            )
            self._prepare(self._database, schema)
            self._inode = self._find_inode()
        except BaseException as error:
            self.close()
            cause = _cause(error)
            if cause is not None:
                kind = LedgerLockedError if cause == "in use" else LedgerError
                raise kind(
                    f"the ledger {self.path} cannot be opened ({error}): {_REMEDIES[cause]}"
                ) from error
            if isinstance(error, sqlite3.DatabaseError | OSError):
                raise LedgerError(
                    f"{self.path} cannot be opened, is damaged or no ledger ({error}). Put its latest "
                    f"backup in its place and merge what checkpoints hold; a new, empty ledger would forget "
                    f"what was spent"
                ) from error
            raise

    def close(self) -> None:
        """Let the file go; once more does nothing."""
        if self._process == os.getpid():
            with self._guard:  # not within another thread's transaction
                self._let_go()
        else:
            self._let_go()  # the guard was copied in whatever state it was

    def _let_go(self) -> None:
        self._closed = True
        if self._database is not None:
            self._database.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread reads or writes meanwhile.

        Raises:
            LedgerError: if it is closed, or belongs to another process.
        """
        self._require_usable()  # before the guard, which a forked child may find held for good
        with self._guard:
            self._require_usable()
            yield

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The database, for queries.

        Raises:
            LedgerError: if it is closed, belongs to another process, or cannot be read.
        """
        with self.alone():
            assert self._database is not None  # it is usable
            try:
                yield self._database
            except sqlite3.DatabaseError as error:
                raise LedgerError(f"the ledger {self.path} cannot be read: {error}") from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: in the end all of it is on the disk, or nothing.

        Raises:
            LedgerWriteError: if it could not be written.
        """
        with self.reading() as database:
            try:
                if self._find_inode() != self._inode:
                    raise sqlite3.DatabaseError("the file was moved or replaced while it was open")
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            except BaseException as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                if isinstance(error, sqlite3.DatabaseError):
                    raise LedgerWriteError(
                        f"the ledger {self.path or 'in memory'} could not be written ({error}), so nothing "
                        f"may be sent; {_REMEDIES[_cause(error) or 'disk']}"
                    ) from error
                raise

    def _require_usable(self) -> None:
        if self._database is None or self._closed or self._process != os.getpid():
            why = "was closed" if self._closed else "belongs to the process that opened it"
            raise LedgerError(f"the ledger {self.path or 'in memory'} {why}; open it with Ledger(path)")

    def _find_inode(self) -> int | None:
        if self.path is None:
            return None
        try:
            return self.path.stat().st_ino
        except OSError:
            return -1

    def _prepare(self, database: sqlite3.Connection, schema: str) -> None:
        execute = database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute(f"PRAGMA journal_mode = {'MEMORY' if self.path is None else 'DELETE'}")
        execute("PRAGMA synchronous = EXTRA")  # the file, and after it the directory
        if problems := [row[0] for row in execute("PRAGMA quick_check") if row[0] != "ok"]:
            raise sqlite3.DatabaseError(problems[0])
        version = execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not execute("SELECT 1 FROM sqlite_master").fetchone():
            execute("BEGIN IMMEDIATE")
            for statement in schema.split(";")[:-1]:
                execute(statement)
            execute(f"PRAGMA application_id = {_APPLICATION}")
            execute(f"PRAGMA user_version = {_VERSION}")
            execute("COMMIT")
            if self.path is not None:
                _sync_directory(self.path.parent)
            return
        if execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise LedgerError(f"{self.path} is a database, but not a ledger; give the ledger another path")
        if version != _VERSION:
            raise LedgerError(
                f"{self.path} was written by a later lightning_ppdl (ledger version {version}; this one "
                f"reads {_VERSION}); upgrade lightning_ppdl"
            )
        # A write that changes nothing: a disk that takes none is noticed here, not at the first release.
        execute("BEGIN IMMEDIATE")
        execute(f"PRAGMA user_version = {_VERSION}")
        execute("COMMIT")


def _cause(error: BaseException) -> str | None:
    """Which of the remedies helps; None for a damaged file and whatever is no affair of the disk's."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return "full"
        if error.errno in (errno.EACCES, errno.EPERM):
            return "permission"
        return "read-only" if error.errno == errno.EROFS else None
    if not isinstance(error, sqlite3.OperationalError):
        return None
    said = str(error)
    # SQLite's result codes are known to Python 3.11 and later only.
    causes = {
        "is full": "full",
        "readonly": "read-only",
        "locked": "in use",
        "I/O": "disk",
        "unable": "permission",
    }
    return next((cause for word, cause in causes.items() if word in said), None)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
