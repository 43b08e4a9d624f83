"""What the tests of the state directory are made of."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_ppdl.server.journal import Accepted, JournalEntry
from lightning_ppdl.server.state import StateDirectory


@contextmanager
def opened(path: Path, compact_bytes: int = 2**26) -> Iterator[StateDirectory]:
    state = StateDirectory(path, compact_bytes)
    state.open(lambda: None)
    try:
        yield state
    finally:
        state.close()


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """A disk that is full: for this process, and while it lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def entry(number: int = 1, size: int = 100) -> JournalEntry:
    accepted = Accepted("anna", number, number - 1, f"{number:064x}", size)
    return JournalEntry(os.urandom(size), (accepted,), {"current": "anna", "queue": ["ben"]})


def contents(state: StateDirectory) -> list[tuple[Any, ...]]:
    return [(one.message, one.accepted, one.turns) for one in state.journal()]


class Told:
    """What each appended entry was told, in order; waits for all."""

    def __init__(self, count: int) -> None:
        self.problems: list[Exception | None] = []
        self._missing = threading.Semaphore(0)
        self._count = count

    def __call__(self, problem: Exception | None) -> bool:
        self.problems.append(problem)
        self._missing.release()
        return True

    def wait(self) -> list[Exception | None]:
        for _ in range(self._count):
            assert self._missing.acquire(timeout=30)
        return self.problems
