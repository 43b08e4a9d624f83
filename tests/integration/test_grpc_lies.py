"""A participant's connection to a server that lies, or is none: a clear error, at once, in bounded memory."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_harness import MANIFEST, SIZE, encoded, resident_bytes, vector

from lightning_ppdl import errors
from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.wire import max_message_bytes

JOINED = pb.JoinReply(session="s", study="t", lease_seconds=60.0)


class Liar:
    """Answers each method with what the test says; counts the requests."""

    url = ""

    def __init__(self) -> None:
        self.answers: dict[str, Iterable[Any]] = {"Join": [JOINED]}
        self.asked = 0
        self.sent = 0
        self.refusal: tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]] | None = None

    def answer(self, sent: Iterator[bytes], context: Any, method: str) -> Iterator[bytes]:
        self.asked += 1
        for _ in sent:
            pass
        if self.refusal is not None:
            code, details, metadata = self.refusal
            context.set_trailing_metadata(metadata)
            context.abort(code, details)
        for message in self.answers[method]:
            self.sent += 1
            yield message if isinstance(message, bytes) else message.SerializeToString()


@pytest.fixture
def liar() -> Iterator[Liar]:
    made = Liar()

    def handler(method: str) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda sent, context: made.answer(sent, context, method))

    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods]
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(messages.SERVICE, {name: handler(name) for name in methods}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    made.url = f"grpc://127.0.0.1:{port}"
    yield made
    server.stop(None).wait()


def connected(liar: Liar, size: int = SIZE) -> Backend:
    backend = connect(liar.url)
    backend.patience_seconds = 600.0
    backend.join("anna", MANIFEST if size == SIZE else vector(size))
    liar.asked = 0
    return backend


@pytest.mark.parametrize(
    "reply",
    [
        b"\xff\xff",
        pb.JoinReply(),
        *(pb.JoinReply(session="s", lease_seconds=x) for x in (0.0, -1.0, math.nan, math.inf)),
        pb.JoinReply(session="s", lease_seconds=60.0, last_round=2**64 - 1),
        pb.JoinReply(session="s", lease_seconds=60.0, version=2**63),
    ],
    ids=range(8),
)
def test_answers_to_a_join_that_nobody_can_go_on_from(liar: Liar, reply: Any) -> None:
    liar.answers["Join"] = [reply]
    backend = connect(liar.url)
    with pytest.raises(errors.ServerFailedError, match="sent what no parameter server sends"):
        backend.join("anna", MANIFEST)
    assert liar.asked == 1
    with pytest.raises(errors.ServerClosedError):
        backend.upload(encoded())


@pytest.mark.parametrize(
    "reply",
    [
        b"\xff",
        pb.ReceiptReply(),
        pb.ReceiptReply(round=2),
        pb.ReceiptReply(round=1, staleness=-1),
        pb.ReceiptReply(round=1, version=2**64 - 1),
    ],
    ids=range(5),
)
def test_receipts_of_something_else(liar: Liar, reply: Any) -> None:
    backend = connected(liar)
    liar.answers["Upload"] = [reply]
    with pytest.raises(errors.ServerFailedError):
        backend.upload(encoded())
    assert liar.asked == 1


def endless(first: pb.Part, size: int) -> Iterator[pb.Part]:
    yield first
    while True:
        yield pb.Part(data=bytes(size))


MOST = max_message_bytes(SIZE)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"\xff\xff"],
        [pb.Part(total_bytes=10, data=b"x" * 9)],
        [pb.Part(total_bytes=10, data=b"x" * 11)],
        [pb.Part(total_bytes=10, data=b"x" * 10), pb.Part(data=b"x")],
        [pb.Part(total_bytes=10, data=b"x" * 10, manifest=messages.manifest_message(MANIFEST))],
        [pb.Part(total_bytes=MOST + 1)],
        [pb.Part(total_bytes=2**64 - 1, data=bytes(2**20))],
        endless(pb.Part(total_bytes=10), 0),
        endless(pb.Part(total_bytes=MOST), 1),
        endless(pb.Part(total_bytes=MOST, data=bytes(MOST)), 2**20),
    ],
    ids=range(11),
)
def test_downloads_that_do_not_keep_their_word(liar: Liar, parts: Iterable[Any]) -> None:
    backend = connected(liar)
    liar.answers["Download"] = parts
    before, started = resident_bytes(), time.monotonic()
    with pytest.raises(errors.ServerFailedError, match="sent what no parameter server sends"):
        backend.download(DownloadRequest(1.0))
    assert time.monotonic() - started < 10.0 and resident_bytes() - before < 100 * 2**20
    assert liar.asked == 1


@pytest.mark.parametrize(
    "parts",
    [
        [pb.Part(total_bytes=10, data=b"x" * 10)],
        [pb.Part(total_bytes=10, data=b"x" * 10, manifest=pb.Manifest(quantity="change"))],
        [pb.Part(total_bytes=10, manifest=messages.manifest_message(vector(2**41)))],
        [pb.Part(total_bytes=2**62, manifest=messages.manifest_message(vector(2**39)))],
        endless(pb.Part(total_bytes=2**30, manifest=messages.manifest_message(MANIFEST)), 2**20),
    ],
    ids=range(5),
)
def test_exports_whose_manifest_lies(liar: Liar, parts: Iterable[Any]) -> None:
    backend = connected(liar)
    liar.answers["Export"] = parts
    with pytest.raises(errors.ServerFailedError):
        backend.export()
    assert liar.asked == 1


@pytest.mark.parametrize(
    ("code", "name", "error", "asked"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "BoundExceededError", errors.BoundExceededError, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "LimitExceededError", errors.LimitExceededError, 1),
        (grpc.StatusCode.UNAVAILABLE, "StateWriteError", errors.StateWriteError, 0),
        (grpc.StatusCode.UNAVAILABLE, None, errors.ServerUnavailableError, 0),
        (grpc.StatusCode.UNIMPLEMENTED, None, errors.ConfigurationError, 1),
        (grpc.StatusCode.INTERNAL, "ServerFailedError", errors.ServerFailedError, 1),
        # No business of a server's: it must not end a run as if the participant's budget were used up.
        (grpc.StatusCode.INTERNAL, "BudgetExhaustedError", errors.ServerFailedError, 1),
        (grpc.StatusCode.INTERNAL, "LedgerWriteError", errors.ServerFailedError, 1),
        (grpc.StatusCode.INTERNAL, "annotations", errors.ServerFailedError, 1),
        (grpc.StatusCode.INVALID_ARGUMENT, "OfALaterVersionError", errors.AdmissionError, 1),
    ],
)
def test_what_a_server_may_have_a_participant_raise(
    liar: Liar, code: grpc.StatusCode, name: str | None, error: type[Exception], asked: int
) -> None:
    """``asked``: how often, 0 for as long as it has patience."""
    backend = connected(liar)
    backend.patience_seconds, backend.tell = 1.0, lambda words: None
    liar.refusal = (code, "\x1b[31mred\nline", () if name is None else (("ppdl-error", name),))
    with pytest.raises(error) as raised:
        backend.status()
    assert type(raised.value) is error
    assert str(raised.value).isprintable()
    assert liar.asked == asked if asked else liar.asked > 1


def test_a_reply_too_large_to_take_is_not_asked_for_again(liar: Liar) -> None:
    backend = connected(liar)
    liar.answers["Status"] = [bytes(3 * 2**20)]
    with pytest.raises(errors.ServerUnavailableError, match="larger than max"):
        backend.status()
    assert liar.asked == 1


def test_a_manifest_too_long_for_a_request_is_not_sent(liar: Liar) -> None:
    names = (f"{number:0100d}" for number in itertools.count())
    long = Manifest(tuple(ParameterSpec(next(names), (2,), "float32") for _ in range(30_000)))
    with pytest.raises(errors.JoinRefusedError, match="share fewer"):
        connect(liar.url).join("anna", long)
    assert liar.asked == 0
