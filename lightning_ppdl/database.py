"""A durable file: SQLite, one process at a time, each write on the disk before it returns."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from lightning_ppdl.errors import ConfigurationError, PPDLError
from lightning_ppdl.lock import PathHeldError, PathLock

_REMEDIES = {
    "full": "the disk or the quota is full: free space, then go on",
    "permission": "there is no permission to read and write it, the .lock beside it and their directory: run "
    "as the user whom they belong to, or give the {noun} another path",
    "read-only": "it is read-only: the file and its directory must be writable",
    "in use": "it is in use by another program or under another name: end that one",
    "disk": "free space or mend the disk, then go on",
}

_LARGEST_WAL_BYTES = 64 * 2**20
"""Of SQLite's own log between two large transactions: what one needed beyond this is given back."""
_LARGE_PAGE_BYTES = 16384


@dataclass(frozen=True)
class DatabaseKind:
    """What a file is for, and what is said where it cannot be used.

    Args:
        noun: Its name in messages, and the argument's that gives its path: ``"ledger"``.
        application: SQLite's mark of whose file it is.
        version: Of the schema; an older package must not pass over what a later one wrote.
        schema: SQL statements that make the tables of a new file.
        journal_mode: SQLite's: ``"DELETE"`` for few writes, ``"WAL"`` for many.
        in_use: What to do if another process holds it.
        damaged: What to do with a damaged one.
        unwritten: What follows from a write that failed.
        error, locked_error, write_error: What is raised: for a file that cannot be used, that another process
            holds, and for a failed write.
    """

    noun: str
    application: int
    version: int
    schema: str
    journal_mode: str
    in_use: str
    damaged: str
    unwritten: str
    error: type[PPDLError]
    locked_error: type[PPDLError]
    write_error: type[PPDLError]


class DatabaseFile:
    """Transactions on the file at ``path``, or in memory for None. Thread-safe; not for forked children.

    Args:
        path: Made if missing.
        kind: What it is for.
    """

    def __init__(self, path: str | Path | None, kind: DatabaseKind) -> None:
        self._kind = kind
        # Another name of the same file must find the same lock.
        self.path = None if path is None else Path(path).resolve()
        if self.path is not None and not self.path.parent.is_dir():
            raise ConfigurationError(
                f"{kind.noun}={str(path)!r}: there is no directory {self.path.parent}; make it first"
            )
        if self.path is not None and self.path.is_dir():
            raise ConfigurationError(f"{kind.noun}={str(path)!r} is a directory; name a file in it")
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
            self._prepare(self._database)
            self._inode = self._find_inode()
        except BaseException as error:
            self.close()
            if isinstance(error, PathHeldError):
                raise kind.locked_error(f"the {kind.noun} {error}: {kind.in_use}") from error
            cause = _cause(error)
            if cause is not None:
                raised = kind.locked_error if cause == "in use" else kind.error
                raise raised(
                    f"the {kind.noun} {self.path} cannot be opened ({error}): {self._remedy(cause)}"
                ) from error
            if isinstance(error, sqlite3.DatabaseError | OSError):
                raise kind.error(
                    f"{self.path} cannot be opened, is damaged or no {kind.noun} ({error}). {kind.damaged}"
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
            PPDLError: the kind's error, if it is closed, or belongs to another process.
        """
        self._require_usable()  # before the guard, which a forked child may find held for good
        with self._guard:
            self._require_usable()
            yield

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The database, for queries.

        Raises:
            PPDLError: the kind's error, if it is closed, belongs to another process, or cannot be read.
        """
        with self.alone():
            assert self._database is not None  # it is usable
            try:
                yield self._database
            except sqlite3.DatabaseError as error:
                raise self._kind.error(
                    f"the {self._kind.noun} {self.path} cannot be read: {error}"
                ) from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: in the end all of it is on the disk, or nothing.

        Raises:
            PPDLError: the kind's error for it, if it could not be written.
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
                    raise self._kind.write_error(
                        f"the {self._kind.noun} {self.path or 'in memory'} could not be written ({error}), "
                        f"so {self._kind.unwritten}; {self._remedy(_cause(error) or 'disk')}"
                    ) from error
                raise

    def _require_usable(self) -> None:
        if self._database is None or self._closed or self._process != os.getpid():
            why = "was closed" if self._closed else "belongs to the process that opened it"
            raise self._kind.error(f"the {self._kind.noun} {self.path or 'in memory'} {why}; open it again")

    def _remedy(self, cause: str) -> str:
        return _REMEDIES[cause].format(noun=self._kind.noun)

    def _find_inode(self) -> int | None:
        if self.path is None:
            return None
        try:
            return self.path.stat().st_ino
        except OSError:
            return -1

    def _prepare(self, database: sqlite3.Connection) -> None:
        kind, execute = self._kind, database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        if kind.journal_mode == "WAL":
            # Rows have tens of kilobytes: larger pages nearly halve what writing one costs. A file that is
            # there already keeps its own.
            execute(f"PRAGMA page_size = {_LARGE_PAGE_BYTES}")
            execute(f"PRAGMA wal_autocheckpoint = {_LARGEST_WAL_BYTES // 2 // _LARGE_PAGE_BYTES}")
        execute(f"PRAGMA journal_mode = {'MEMORY' if self.path is None else kind.journal_mode}")
        execute("PRAGMA synchronous = EXTRA")  # the file, and after it the directory
        execute(f"PRAGMA journal_size_limit = {_LARGEST_WAL_BYTES}")
        if problems := [row[0] for row in execute("PRAGMA quick_check") if row[0] != "ok"]:
            raise sqlite3.DatabaseError(problems[0])
        version = execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not execute("SELECT 1 FROM sqlite_master").fetchone():
            execute("BEGIN IMMEDIATE")
            for statement in kind.schema.split(";")[:-1]:
                execute(statement)
            execute(f"PRAGMA application_id = {kind.application}")
            execute(f"PRAGMA user_version = {kind.version}")
            execute("COMMIT")
            if self.path is not None:
                _sync_directory(self.path.parent)
            return
        if execute("PRAGMA application_id").fetchone()[0] != kind.application:
            raise kind.error(
                f"{self.path} is a database, but not a {kind.noun}; give the {kind.noun} another path"
            )
        if version != kind.version:
            raise kind.error(
                f"{self.path} was written by a later lightning_ppdl ({kind.noun} version {version}; this one "
                f"reads {kind.version}); upgrade lightning_ppdl"
            )
        # A write that changes nothing: a disk that takes none is noticed here, not at the first release.
        execute("BEGIN IMMEDIATE")
        execute(f"PRAGMA user_version = {kind.version}")
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
