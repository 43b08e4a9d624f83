"""What the backends' tests are made of: a server to connect to, messages, threads, a look at the state."""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.records import (
    Manifest,
    ParameterSpec,
    Quantity,
    SparseUpdate,
)
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add

SIZE = 20
MANIFEST = Manifest((ParameterSpec("w", (4, 3), "float32"), ParameterSpec("b", (8,), "float32")))


def manifest(fraction: float = 1.0, bound: float | None = None, quantity: Quantity = "change") -> Manifest:
    return Manifest(MANIFEST.parameters, quantity, fraction, bound)


def update(name: str = "anna", round_: int = 1, base: int = 0, **entries: Any) -> SparseUpdate:
    indices = np.asarray(entries.get("indices", [0, 5]), np.int64)
    values = np.asarray(entries.get("values", np.ones(len(indices))), np.float32)
    return SparseUpdate(name, round_, base, indices, values)


def encoded(name: str = "anna", round_: int = 1, base: int = 0, **entries: Any) -> bytes:
    return wire.encode_update(update(name, round_, base, **entries), SIZE)


def in_threads(*work: Callable[[], object]) -> None:
    """Run all at once; what one raises is raised here, and nothing waits for ever."""
    failures: list[BaseException] = []

    def run(part: Callable[[], object]) -> None:
        try:
            part()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "still waiting after a minute"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class State:
    """All that a refused request must leave untouched, as seen from outside."""

    def __init__(self, server: ParameterServer) -> None:
        status = server.status()
        self.parameters = None if server.status().parameters == 0 else server.parameters()
        self.counts = dataclasses.asdict(
            dataclasses.replace(
                status,
                rejections={},
                members=tuple(dataclasses.replace(m, idle_seconds=0.0) for m in status.members),
            )
        )

    def require_unchanged(self, server: ParameterServer) -> None:
        now = State(server)
        assert now.counts == self.counts
        if self.parameters is not None:
            np.testing.assert_array_equal(now.parameters, self.parameters)


class Served(ABC):
    """A server and connections to it, by two factories that each backend supplies."""

    @abstractmethod
    def make_server(self, **settings: Any) -> ParameterServer:
        """Serve a new ``ParameterServer(**settings)``, in this process, until the test ends."""

    @abstractmethod
    def connect(self) -> Backend:
        """A new connection to the server that :meth:`make_server` made, not joined yet."""

    def member(self, name: str, declared: Manifest = MANIFEST) -> Backend:
        """A connection that has joined, and offered zeros if the server had no parameters."""
        backend = self.connect()
        if backend.join(name, declared).needs_initial:
            backend.offer_initial(np.zeros(SIZE, np.float32))
        return backend

    def add_server(self, **settings: Any) -> ParameterServer:
        return self.make_server(merge=Add(), **settings)
