"""Uploads and downloads a second over loopback, beside a bare gRPC echo of the same sizes in the same run.

    python benchmarks/throughput.py

The paper's MLP (P = 140,106), a tenth of it up (the update's own encoding), all of it down. Server, echo and
clients are processes; 32 clients' requests are under way at once. Repetitions alternate, medians count.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lightning_ppdl import wire
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb

P, ENTRIES, CLIENTS = 140_106, 14_010, 32
MANIFEST = Manifest((ParameterSpec("w", (P,), "float32"),))
SERVICE = f"/{messages.SERVICE}"
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

Request = Callable[[int, int], Awaitable[object]]


@dataclass(frozen=True)
class Served:
    """One of the things measured: how often a second, and how long each took."""

    name: str
    rate: float
    seconds: list[float]


def serve_echo(ready: Any) -> None:
    """Answers what it is sent with as many bytes as the first four say."""

    async def main() -> None:
        async def echo(request: bytes, context: object) -> bytes:
            return b"." * int.from_bytes(request[:4], "little")

        server = grpc.aio.server(options=OPTIONS)
        handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.put(port)
        await server.wait_for_termination()

    asyncio.run(main())


def serve_parameters(ready: Any, state: str | None) -> None:
    from lightning_ppdl.cli.serve import SWITCH_SECONDS
    from lightning_ppdl.server.core import ParameterServer
    from lightning_ppdl.server.merge import Add
    from lightning_ppdl.server.service import GrpcService
    from lightning_ppdl.server.state import StateDirectory

    initial = np.random.default_rng(0).standard_normal(P).astype(np.float32)
    kept = None if state is None else StateDirectory(state)
    service = GrpcService(ParameterServer(merge=Add(), initial=initial, state=kept), "127.0.0.1:0")
    sys.setswitchinterval(SWITCH_SECONDS)  # as ppdl serve does
    service.start()
    ready.put(int(service.url.rpartition(":")[2]))
    time.sleep(3600)


async def load(name: str, request: Request, count: int) -> Served:
    """``count`` requests, by :data:`CLIENTS` that each wait for their answer."""
    seconds: list[float] = []

    async def client(number: int) -> None:
        for turn in range(count // CLIENTS):
            began = time.perf_counter()
            await request(number, turn)
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return Served(name, len(seconds) / (time.perf_counter() - began), seconds)


def updates(repetitions: int, each: int) -> list[list[bytes]]:
    """Every client's uploads, encoded beforehand: the server is what is measured."""
    stream = np.random.default_rng(1)
    made = []
    for number in range(CLIENTS):
        indices = np.sort(stream.choice(P, ENTRIES, replace=False)).astype(np.int64)
        values = (1e-3 * stream.standard_normal(ENTRIES)).astype(np.float32)
        rounds = range(1, repetitions * each + 1)
        made.append(
            [wire.encode_update(SparseUpdate(f"p{number}", r, 0, indices, values), P) for r in rounds]
        )
    return made


class Clients:
    """Participants of one server, without their training."""

    def __init__(self, channel: Any, uploads: list[list[bytes]]) -> None:
        self._join = channel.unary_unary(
            f"{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinReply.FromString
        )
        # Serialised beforehand as well, as what is sent to the echo is.
        self._upload = channel.unary_unary(f"{SERVICE}/Upload", None, pb.ReceiptReply.FromString)
        self._download = channel.unary_stream(
            f"{SERVICE}/Download", pb.DownloadRequest.SerializeToString, pb.Part.FromString
        )
        self._updates = uploads
        self._uploads: list[Iterator[bytes]] = []
        self._sessions: list[str] = []

    async def join(self) -> None:
        for number in range(CLIENTS):
            request = pb.JoinRequest(participant=f"p{number}", manifest=messages.manifest_message(MANIFEST))
            session = (await self._join(request)).session
            self._sessions.append(session)
            requests = [pb.UploadRequest(session=session, update=each) for each in self._updates[number]]
            self._uploads.append(iter([request.SerializeToString() for request in requests]))

    async def upload(self, number: int, turn: int) -> None:
        await self._upload(next(self._uploads[number]))

    async def download(self, number: int, turn: int) -> int:
        request = messages.download_message(self._sessions[number], DownloadRequest(1.0))
        return sum([len(part.data) async for part in self._download(request)])


async def measure(ports: dict[str, int], repetitions: int, count: int) -> dict[str, list[Served]]:
    def open_channel(port: int) -> Any:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)

    channels = {name: open_channel(port) for name, port in ports.items()}
    echo = channels["echo"].unary_unary("/bare/Echo")
    uploads = updates(repetitions, count // CLIENTS)
    memory, journal = Clients(channels["memory"], uploads), Clients(channels["journal"], uploads)
    await memory.join()
    await journal.join()
    up_bytes, down_bytes = len(uploads[0][0]), await memory.download(0, 0)
    up, down = bytes(4) + b"." * (up_bytes - 4), down_bytes.to_bytes(4, "little")
    naive_up, naive_down = bytes(4) + b"." * (8 * ENTRIES - 4), (4 * P).to_bytes(4, "little")
    measured: dict[str, Request] = {
        f"echo, {up_bytes:,} B up": lambda number, turn: echo(up),
        f"echo, {8 * ENTRIES:,} B up": lambda number, turn: echo(naive_up),
        "upload": memory.upload,
        "upload, journalled": journal.upload,
        f"echo, {down_bytes:,} B down": lambda number, turn: echo(down),
        f"echo, {4 * P:,} B down": lambda number, turn: echo(naive_down),
        "download": memory.download,
    }
    found: dict[str, list[Served]] = {name: [] for name in measured}
    for _ in range(repetitions):
        for name, request in measured.items():
            found[name].append(await load(name, request, count))
    for channel in channels.values():
        await channel.close()
    return found


def report(found: dict[str, list[Served]]) -> None:
    def rate(name: str) -> float:
        return statistics.median(served.rate for served in found[name])

    print(f"{'':28}{'a second':>10}{'p50 ms':>9}{'p99 ms':>9}   of the echo of the same / the plain size")
    names = list(found)
    for name in names:
        seconds = sorted(second for served in found[name] for second in served.seconds)
        p50, p99 = seconds[len(seconds) // 2], seconds[int(0.99 * len(seconds))]
        echoes = names[4:6] if name == "download" else names[:2]
        ratios = (
            ""
            if "echo" in name
            else f"   {rate(name) / rate(echoes[0]):.0%} / {rate(name) / rate(echoes[1]):.0%}"
        )
        print(f"{name:28}{rate(name):10.0f}{1e3 * p50:9.2f}{1e3 * p99:9.2f}{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1600, help="in each repetition")
    settings = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ports, processes = {}, []
        for name, target, arguments in (
            ("echo", serve_echo, ()),
            ("memory", serve_parameters, (None,)),
            ("journal", serve_parameters, (str(Path(directory) / "state"),)),
        ):
            ready = context.Queue()
            process = context.Process(target=target, args=(ready, *arguments), daemon=True)
            process.start()
            processes.append(process)
            ports[name] = ready.get(timeout=60)
        try:
            report(asyncio.run(measure(ports, settings.repetitions, settings.requests)))
        finally:
            for process in processes:
                process.kill()
                process.join()


if __name__ == "__main__":
    main()
