"""Two servers that are asked the same: one is restarted now and then, the other never."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ppdl import wire
from lightning_ppdl.errors import LateUpdateError, PPDLError, TurnNotHeldError
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add
from lightning_ppdl.server.state import StateDirectory

SIZE = 37
MANIFEST = Manifest((ParameterSpec("w", (SIZE,), "float32"),))


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def encoded(name: str, round_: int, base: int, stream: np.random.Generator, size: int = SIZE) -> bytes:
    """A random update of a few entries."""
    count = int(stream.integers(0, size + 1))
    indices = np.sort(stream.choice(size, count, replace=False)).astype(np.int64)
    values = stream.standard_normal(count).astype(np.float32)
    return wire.encode_update(SparseUpdate(name, round_, base, indices, values), size)


def flush(server: ParameterServer) -> None:
    """Wait until all that a server has handed to its state directory is on the disk."""
    written = threading.Event()

    def then(problem: Exception | None) -> bool:
        written.set()
        return True

    assert server._state is not None
    server._state.note("flush", 0, then)
    assert written.wait(30)


def everything(server: ParameterServer) -> dict[str, Any]:
    """All that a restart must not change: values, versions, books, and whose turn it is."""
    status = server.status()
    numbers, arrays = server._vector.save() if server._vector.filled else ({}, {})
    return {
        "numbers": numbers,
        "arrays": {name: (array.dtype.str, array.tobytes()) for name, array in arrays.items()},
        "status": replace(
            status,
            rejections={},
            downloaded_bytes=0,
            members=tuple(replace(member, idle_seconds=0.0) for member in status.members),
        ),
        "receipts": {name: member.receipt for name, member in server._books.members.items()},
        "turns": server._turns.state_dict(),
    }


def serving(path: Path, **settings: Any) -> ParameterServer:
    server = ParameterServer(**{"merge": Add(), "state": StateDirectory(path), **settings})
    server.open()
    return server


def joined(server: ParameterServer, name: str) -> str:
    membership = server.join(name, MANIFEST)
    if membership.needs_initial:
        server.offer_initial(membership.session, np.zeros(SIZE, np.float32))
    return membership.session


def message(name: str, round_: int = 1, base: int = 0, seed: int = 0) -> bytes:
    return encoded(name, round_, base, np.random.default_rng(seed))


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """A disk that is full: for this process, and while it lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Twins:
    """Every request goes to both; answers and states have to be equal.

    Args:
        directory: For the state directories.
        make: A new server with these further arguments.
        compact_bytes: Of the state directories.
    """

    def __init__(
        self, directory: Path, make: Callable[..., ParameterServer], compact_bytes: int = 2**26
    ) -> None:
        self._directory = directory
        self._make = make
        self._compact_bytes = compact_bytes
        self._lives = 0
        self.clock = Clock()
        self.steady = make(clock=self.clock)
        self.path = directory / "life-0"
        self.restarted = self._open()
        self.sessions: dict[str, tuple[str, str]] = {}

    def ask(self, method: str, name: str, *arguments: Any) -> Any:
        """One request of one participant; the answer, or the error."""
        steady, restarted = self.sessions.get(name, ("nobody", "nobody"))
        first = _answer(getattr(self.steady, method), steady, *arguments)
        second = _answer(getattr(self.restarted, method), restarted, *arguments)
        assert first == second, (method, name, first, second)
        self.compare()
        return first

    def join(self, name: str) -> None:
        steady, restarted = self.steady.join(name, MANIFEST), self.restarted.join(name, MANIFEST)
        assert replace(steady, session="", study="") == replace(restarted, session="", study="")
        self.sessions[name] = steady.session, restarted.session
        if steady.needs_initial:
            self.ask("offer_initial", name, np.linspace(-1, 1, SIZE).astype(np.float32))
        self.compare()

    def download(self, name: str, known: int | None, fraction: float) -> int:
        answer = self.ask("download", name, DownloadRequest(fraction, known))
        return known or 0 if isinstance(answer, tuple) else wire.decode_download(answer, SIZE).version

    def restart(self, kill: bool, **settings: Any) -> None:
        """A new server on the same directory; with ``kill`` on a copy, as a killed one leaves it."""
        study = self.restarted.study
        flush(self.restarted)
        self._lives += 1
        if kill:
            before, self.path = self.path, self._directory / f"life-{self._lives}"
            shutil.copytree(before, self.path)
        self.restarted.close()
        self.restarted = self._open(**settings)
        assert self.restarted.study == study

    def compare(self) -> None:
        steady, restarted = everything(self.steady), everything(self.restarted)
        for part, value in steady.items():
            assert restarted[part] == value, part

    def close(self) -> None:
        self.steady.close()
        self.restarted.close()

    def _open(self, **settings: Any) -> ParameterServer:
        state = StateDirectory(self.path, self._compact_bytes)
        server = self._make(clock=self.clock, state=state, **settings)
        server.open()
        return server


def _answer(method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(*arguments)
    except PPDLError as error:
        # Which cycle it was late for is not known after a restart; that it has no turn is.
        kind = TurnNotHeldError if isinstance(error, LateUpdateError) else type(error)
        return kind, "" if kind is TurnNotHeldError else str(error)
