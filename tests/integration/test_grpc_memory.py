"""Large messages pass over real sockets, and a server's memory does not grow with what has passed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from grpc_harness import encoded, resident_bytes, serving, vector

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.records import DownloadRequest
from lightning_ppdl.server.state import StateDirectory


def test_messages_of_forty_megabytes_pass() -> None:
    size = 10_000_000
    noise = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    with serving() as served:
        anna = connect(served.url)
        assert anna.join("anna", vector(size)).needs_initial
        assert anna.offer_initial(noise)
        raw = encoded(size=size, indices=range(size), values=noise.view(np.uint32).astype(np.float32))
        assert anna.upload(raw).version == 1
        message = anna.download(DownloadRequest(1.0))
        assert min(len(raw), len(message)) > 25_000_000
        got = wire.decode_download(message, size)
        np.testing.assert_array_equal(got.values, served.server.parameters())
        manifest, exported = anna.export()
        assert manifest.size == size and len(exported) == len(message)
        anna.leave()


@pytest.mark.parametrize("durable", [False, True])
def test_memory_is_flat_over_uploads(durable: bool, tmp_path: Path) -> None:
    """Server and clients are both in this process. benchmarks/server_memory.py measures more, for longer."""
    size, participants, rounds = 20_000, 50, 30
    state = StateDirectory(tmp_path / "state", compact_bytes=2**20) if durable else None
    values = np.random.default_rng(0).standard_normal(size // 10).astype(np.float32)
    with serving(initial=np.zeros(size, np.float32), state=state) as served:
        members: dict[str, Backend] = {}
        for number in range(participants):
            members[f"p{number}"] = served.member(f"p{number}", vector(size))
        resident = []
        for round_ in range(1, rounds + 1):
            for name, member in members.items():
                if round_ % 3 == 0:
                    member.download(DownloadRequest(0.1, 0))
                indices = range(round_, size, 10)
                message = encoded(name, round_, size=size, indices=indices, values=values[: len(indices)])
                member.upload(message)
            resident.append(resident_bytes())
        assert served.server.version == participants * rounds
        # A thousand uploads of eight kilobytes, and the downloads beside them, are more than that.
        assert resident[-1] - resident[rounds // 3] < 6 * 2**20
        for member in members.values():
            member.leave()
