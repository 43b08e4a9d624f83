"""Resident memory of a served parameter server over 10,000 uploads of 200 participants.

    python benchmarks/server_memory.py

The server is a process of its own, and each participant a connection of its own over loopback, with joins,
downloads and uploads as in training: a tenth of the paper's MLP (P = 140,106) up, what changed down. Once
with everything in memory, once with a state directory.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from support import print_table

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec, SparseUpdate

STEPS, THREADS = 4, 8


def serve(control: Any, state: str | None) -> None:
    """Serve until told to stop."""
    from lightning_ppdl.server.core import ParameterServer
    from lightning_ppdl.server.service import GrpcService
    from lightning_ppdl.server.state import StateDirectory

    directory = None if state is None else StateDirectory(state, compact_bytes=8 * 2**20)
    server = ParameterServer(state=directory)
    service = GrpcService(server, "127.0.0.1:0")
    service.start()
    control.send(service.url)
    control.recv()
    service.stop()
    server.close()


class Participant:
    """One connection that trains on nothing: its updates are noise."""

    def __init__(self, url: str, number: int, size: int) -> None:
        self.name, self._size = f"participant-{number}", size
        self._backend: Backend = connect(url)
        self._version: int | None = None
        self._round = 0
        self._noise = np.random.default_rng(number)
        manifest = Manifest((ParameterSpec("w", (size,), "float32"),))
        if self._backend.join(self.name, manifest).needs_initial:
            self._backend.offer_initial(np.zeros(size, np.float32))

    def exchange(self) -> None:
        """One round."""
        message = self._backend.download(DownloadRequest(1.0, self._version))
        self._version = wire.decode_download(message, self._size).version
        self._round += 1
        count = self._size // 10
        indices = np.sort(self._noise.choice(self._size, count, replace=False)).astype(np.int64)
        values = self._noise.normal(0.0, 1e-3, count).astype(np.float32)
        update = SparseUpdate(self.name, self._round, self._version, indices, values)
        self._backend.upload(wire.encode_update(update, self._size))

    def leave(self) -> None:
        self._backend.leave()


def measure(uploads: int, participants: int, size: int, durable: bool) -> list[tuple[int, int]]:
    """The server's resident bytes after 0 uploads, and after each quarter of them."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory()) if durable else None
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, state))
        process.start()
        stack.callback(process.join)
        stack.callback(ours.send, "stop")
        url = ours.recv()
        resident = psutil.Process(process.pid).memory_info
        members = [Participant(url, number, size) for number in range(participants)]
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        measured = [(0, int(resident().rss))]
        following = itertools.cycle(range(participants))
        for step in range(STEPS):
            # Nobody's rounds overlap: each thread has participants of its own.
            work: list[list[Participant]] = [[] for _ in range(THREADS)]
            for number in itertools.islice(following, uploads // STEPS):
                work[number % THREADS].append(members[number])
            list(pool.map(_exchange, work))
            measured.append(((step + 1) * (uploads // STEPS), int(resident().rss)))
        for member in members:
            member.leave()
    return measured


def _exchange(members: list[Participant]) -> None:
    for member in members:
        member.exchange()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--uploads", type=int, default=10_000)
    arguments.add_argument("--participants", type=int, default=200)
    arguments.add_argument("--size", type=int, default=140_106, help="shared entries, P")
    given = arguments.parse_args()
    runs = {
        place: measure(given.uploads, given.participants, given.size, place == "state directory")
        for place in ("memory", "state directory")
    }
    counts = [uploads for uploads, _ in runs["memory"]]
    rows = [
        [place, *(f"{resident / 2**20:.0f} MiB" for _, resident in measured)]
        for place, measured in runs.items()
    ]
    print_table(["resident after uploads", *map(str, counts)], rows)


if __name__ == "__main__":
    main()
