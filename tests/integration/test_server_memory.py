"""What a server process holds does not grow with the uploads that it has merged."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from grpc_harness import join_request, vector

from lightning_ppdl import wire
from lightning_ppdl.records import SparseUpdate
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb

SIZE, ENTRIES, AT_ONCE = 100_000, 10_000, 8
SERVICE = f"/{messages.SERVICE}"
MOST_GROWTH_BYTES = 20e6


def serve(ready: Any, state: str | None) -> None:
    from lightning_ppdl.server.core import ParameterServer
    from lightning_ppdl.server.merge import Add
    from lightning_ppdl.server.service import GrpcService
    from lightning_ppdl.server.state import StateDirectory

    kept = None if state is None else StateDirectory(state)
    server = ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32), state=kept)
    service = GrpcService(server, "127.0.0.1:0")
    service.start()
    ready.put(service.url.partition("://")[2])
    time.sleep(3600)


class Participants:
    """Members of one server that upload in turns, without their training."""

    def __init__(self, channel: Any, count: int) -> None:
        self._channel = channel
        self._names = [f"p{number}" for number in range(count)]
        self._sessions: list[str] = []
        self._done = 0
        stream = np.random.default_rng(0)
        chosen = [stream.choice(SIZE, ENTRIES, replace=False) for _ in range(AT_ONCE)]
        self._indices = [np.sort(each).astype(np.int64) for each in chosen]
        self._values = (1e-3 * stream.standard_normal(ENTRIES)).astype(np.float32)

    async def join(self) -> None:
        ask = self._channel.unary_unary(
            f"{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinReply.FromString
        )
        for name in self._names:
            self._sessions.append((await ask(join_request(name, vector(SIZE)))).session)

    async def upload(self, count: int) -> None:
        """The next ``count`` uploads; all are encoded before the first is sent."""
        requests = iter([self._request(number) for number in range(self._done, self._done + count)])
        self._done += count
        ask = self._channel.unary_unary(f"{SERVICE}/Upload", None, pb.ReceiptReply.FromString)

        async def sender() -> None:
            for request in requests:
                await ask(request)

        await asyncio.gather(*(sender() for _ in range(AT_ONCE)))

    async def uploads(self) -> int:
        ask = self._channel.unary_unary(
            f"{SERVICE}/Status", pb.StatusRequest.SerializeToString, pb.StatusReply.FromString
        )
        return int((await ask(pb.StatusRequest())).uploads)

    def _request(self, number: int) -> bytes:
        round_, who = divmod(number, len(self._names))
        indices = self._indices[number % len(self._indices)]
        update = SparseUpdate(self._names[who], round_ + 1, 0, indices, self._values)
        message = pb.UploadRequest(session=self._sessions[who], update=wire.encode_update(update, SIZE))
        return bytes(message.SerializeToString())


async def load(address: str, server: Any, participants: int, uploads: int, every: int) -> dict[int, int]:
    """The server's resident bytes, by the number of uploads so far."""
    async with grpc.aio.insecure_channel(address) as channel:
        members = Participants(channel, participants)
        await members.join()
        held = {0: int(server.memory_info().rss)}
        for done in range(every, uploads + 1, every):
            await members.upload(every)
            held[done] = int(server.memory_info().rss)
        assert await members.uploads() == uploads
    return held


def measured(participants: int, uploads: int, every: int, state: Path | None) -> dict[int, int]:
    """What a server held that was started for this, and stopped."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    directory = None if state is None else str(state)
    process = context.Process(target=serve, args=(ready, directory), daemon=True)
    process.start()
    try:
        address = ready.get(timeout=60)
        return asyncio.run(load(address, psutil.Process(process.pid), participants, uploads, every))
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "state directory"])
def test_a_thousand_uploads_more_cost_no_memory(durable: bool, tmp_path: Path) -> None:
    held = measured(50, 1500, 500, tmp_path / "state" if durable else None)
    assert held[1500] - held[500] < MOST_GROWTH_BYTES, held
