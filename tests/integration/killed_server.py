"""A server in a process of its own, with threads that upload to it until the process is killed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from lightning_ppdl import Add, ParameterServer, wire
from lightning_ppdl.records import Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.server.state import StateDirectory

ENTRIES = 200
"""A participant's. Round r adds r to entry r % ENTRIES of its own: each set of rounds has sums of its own."""


def upload_for_ever(path: Path, threads: int, told: Path) -> None:
    """Append a line to ``told`` before each upload, and one with the receipt after it."""
    file = os.open(told, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    server = ParameterServer(merge=Add(), state=StateDirectory(path, compact_bytes=20_000))
    server.open()
    manifest = Manifest((ParameterSpec("w", (threads, ENTRIES), "float32"),))

    def upload(number: int) -> None:
        name = f"p{number}"
        joined = server.join(name, manifest)
        if joined.needs_initial:
            server.offer_initial(joined.session, np.zeros(manifest.size, np.float32))
        round_ = joined.last_round
        while True:
            round_ += 1
            at = np.array([number * ENTRIES + round_ % ENTRIES])
            update = SparseUpdate(name, round_, 0, at, np.array([round_], np.float32))
            os.write(file, f"sent {number} {round_} 0\n".encode())
            receipt = server.upload(joined.session, wire.encode_update(update, manifest.size))
            os.write(file, f"acked {number} {round_} {receipt.version}\n".encode())

    upload_in_threads = [threading.Thread(target=upload, args=(number,)) for number in range(1, threads)]
    for thread in upload_in_threads:
        thread.start()
    upload(0)
