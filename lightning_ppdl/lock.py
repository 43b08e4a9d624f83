"""One holder at a time, across processes, of what lies at a path."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: SQLite's own exclusive lock is the only one there
    fcntl = None  # type: ignore[assignment]

_held: weakref.WeakSet[PathLock] = weakref.WeakSet()


class PathHeldError(OSError):
    """Somebody else holds the lock."""


class PathLock:
    """An exclusive lock on ``path``, held until :meth:`release` or until the process ends, however it ends.

    The lock is the operating system's, on a file ``path.lock`` that stays: what a killed process leaves
    behind holds nobody up. A second holder in the same process is refused like one in another.

    Raises:
        PathHeldError: naming the process that holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file: int | None = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(self._file, 32).decode(errors="replace").strip() or "unknown"
                self.release()
                raise PathHeldError(f"{path} is in use by process {holder}") from error
        os.ftruncate(self._file, 0)
        os.write(self._file, str(os.getpid()).encode())
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; once more does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _forked() -> None:
    # A child that outlives its parent, a data loader's worker perhaps, must not keep the lock. Closing
    # its descriptor leaves the parent's lock as it is.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
