"""A server to attack, and a client that sends whatever bytes it likes."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import psutil  # type: ignore[import-untyped]

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add
from lightning_ppdl.server.security import Limits, Security
from lightning_ppdl.server.service import GrpcService

SIZE = 20
MANIFEST = Manifest((ParameterSpec("w", (4, 3), "float32"), ParameterSpec("b", (8,), "float32")))
PATIENT_SECONDS = 20.0
"""What takes longer than this hangs."""
_numbers = itertools.count()


def vector(size: int) -> Manifest:
    return Manifest((ParameterSpec("w", (size,), "float32"),))


def encoded(name: str = "anna", round_: int = 1, base: int = 0, size: int = SIZE, **entries: Any) -> bytes:
    indices = np.asarray(entries.get("indices", [0, 5]), np.int64)
    values = np.asarray(entries.get("values", np.ones(len(indices))), np.float32)
    return wire.encode_update(SparseUpdate(name, round_, base, indices, values), size)


@dataclass(frozen=True)
class Served:
    """A service and the server behind it."""

    service: GrpcService
    server: ParameterServer

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def member(self, name: str, manifest: Manifest = MANIFEST) -> Backend:
        """A connection that has joined, and offered zeros where there was nothing yet."""
        backend = connect(self.url)
        backend.patience_seconds = 5.0
        if backend.join(name, manifest).needs_initial:
            backend.offer_initial(np.zeros(manifest.size, np.float32))
        return backend


@contextmanager
def serving(
    security: Security | None = None, limits: Limits | None = None, **settings: Any
) -> Iterator[Served]:
    server = ParameterServer(**{"merge": Add(), **settings})
    service = GrpcService(server, "127.0.0.1:0", security, limits)
    service.start()
    try:
        yield Served(service, server)
    finally:
        service.stop()
        server.close()


def seen(server: ParameterServer) -> tuple[Any, ...]:
    """All that a refused request must leave as it was."""
    status = server.status()
    members = tuple(dataclasses.replace(member, idle_seconds=0.0) for member in status.members)
    status = dataclasses.replace(status, members=members, rejections={})
    values = server.parameters().tobytes() if status.parameters and status.members else b""
    return status, values


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        code: The status code's name.
        error: The error class that the trailing metadata name.
        details: The status's words.
        replies: The messages, as bytes.
    """

    code: str
    error: str
    details: str
    replies: tuple[bytes, ...]


def session_of(backend: Backend) -> str:
    """The secret that a thief would have stolen."""
    return str(backend._session)  # type: ignore[attr-defined]


class Client:
    """Sends bytes, well-formed or not, over a connection of its own."""

    def __init__(
        self,
        url: str,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, Any]] = (),
    ) -> None:
        address = url.partition("://")[2]
        # Without the number, channels to one address would share one connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("ppdl.test", next(_numbers))]
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self.metadata = metadata

    def begin(self, method: str, sent: Iterable[bytes | Any], timeout: float = PATIENT_SECONDS) -> Any:
        """Begin a request; what it returns is read from, or not."""
        call = self.channel.stream_stream(
            f"/{messages.SERVICE}/{method}" if "/" not in method else method,
            lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            lambda raw: raw,
        )
        return call(iter(sent), timeout=timeout, metadata=self.metadata)

    def ask(self, method: str, *sent: bytes | Any, timeout: float = PATIENT_SECONDS) -> Answer:
        return outcome(self.begin(method, sent, timeout))

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def outcome(call: Any) -> Answer:
    """Read all that comes."""
    replies: list[bytes] = []
    with suppress(grpc.RpcError):
        replies.extend(call)
    named = [value for key, value in call.trailing_metadata() or () if key == "ppdl-error"]
    return Answer(call.code().name, "".join(named), call.details() or "", tuple(replies))


def join_request(name: str, manifest: Manifest = MANIFEST) -> pb.JoinRequest:
    return pb.JoinRequest(participant=name, manifest=messages.manifest_message(manifest))


def resident_bytes() -> int:
    """Of this process, which is server and clients."""
    return int(psutil.Process().memory_info().rss)


def eventually(holds: Callable[[], bool], seconds: float = PATIENT_SECONDS) -> None:
    """Wait until ``holds()``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.01)


class Pause:
    """Parts that come when the test says so; for ever, if it never does."""

    def __init__(self, *parts: pb.Part) -> None:
        self._parts = parts
        self.over = threading.Event()

    def __iter__(self) -> Iterator[pb.Part]:
        yield from self._parts
        self.over.wait(PATIENT_SECONDS)


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[list[object]]:
    """Run ``work`` beside the block; what it returned, or raised, is in the list after it."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield results
    thread.join(PATIENT_SECONDS)
    assert not thread.is_alive(), "still waiting"


class Target:
    """A server with anna in it, one round old, and a client that means no good."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.server = served.server
        self.anna = served.member("anna")
        self.anna.upload(encoded())
        self.session = session_of(self.anna)
        self.client = Client(served.url)
        self.round = 1

    def require_refused(self, method: str, *sent: Any, error: str, code: str) -> str:
        """One refusal, counted once, that changes nothing and says nothing of the server's insides."""
        before, counted = seen(self.server), self.server.status().rejections
        started = time.monotonic()
        answer = self.client.ask(method, *sent)
        assert (answer.code, answer.error) == (code, error), answer
        assert time.monotonic() - started < PATIENT_SECONDS / 2
        assert len(answer.details.encode()) < 2000
        assert "Traceback" not in answer.details and ".py" not in answer.details
        assert seen(self.server) == before
        after = self.server.status().rejections
        assert {**counted, error: counted.get(error, 0) + 1} == after
        return answer.details

    def require_at_work(self) -> None:
        self.round += 1
        base = wire.decode_download(self.anna.download(DownloadRequest(1.0)), SIZE).version
        assert self.anna.upload(encoded(round_=self.round, base=base)).round == self.round
