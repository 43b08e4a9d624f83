"""Slow, silent and greedy clients: each costs the server little, and keeps nobody waiting."""

from __future__ import annotations

import itertools
import logging
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc_harness import (
    MANIFEST,
    PATIENT_SECONDS,
    SIZE,
    Client,
    Pause,
    Served,
    encoded,
    eventually,
    outcome,
    resident_bytes,
    seen,
    serving,
    session_of,
    vector,
)
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from lightning_ppdl import errors
from lightning_ppdl.records import DownloadRequest
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.security import Limits
from lightning_ppdl.server.state import StateDirectory

HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
QUICK = Limits(silence_seconds=0.4, max_transfers=1)


def require_prompt(served: Served, name: str = "ben") -> None:
    """Somebody else's whole round, done in no time."""
    started = time.monotonic()
    ben = served.member(name, MANIFEST if served.server.size == SIZE else vector(served.server.size))
    ben.download(DownloadRequest(1.0))
    round_ = next(m.rounds for m in served.server.status().members if m.name == name) + 1
    ben.upload(encoded(name, round_, size=served.server.size))
    ben.leave()
    assert time.monotonic() - started < 8.0


@pytest.mark.parametrize("sent", [0, 1])
@pytest.mark.parametrize("method", ["UploadParts", "OfferInitial"])
def test_who_falls_silent_in_the_middle_is_let_go(method: str, sent: int) -> None:
    with serving(limits=QUICK) as served, Client(served.url) as client:
        anna = served.member("anna", vector(5000))
        part = pb.Part(session=session_of(anna), total_bytes=20_000, data=bytes(5000))
        silent = Pause(*[part] * sent)
        before = seen(served.server)
        answer = outcome(client.begin(method, silent))
        assert (answer.code, answer.error) == ("UNAVAILABLE", "ServerUnavailableError")
        assert "0.4 seconds" in answer.details
        assert seen(served.server) == before
        silent.over.set()
        assert anna.upload(encoded(size=5000)).version == 1


def test_a_request_without_its_message_is_let_go() -> None:
    with serving(limits=QUICK) as served, Client(served.url) as client:
        for method in ("Join", "Status", "Upload", f"/{HEALTH}/Check"):
            silent = Pause()
            assert outcome(client.begin(method, silent)).code == "UNAVAILABLE", method
            silent.over.set()


def test_a_download_that_is_not_taken_holds_no_place_for_long() -> None:
    size = 4_000_000
    noise = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    with serving(limits=QUICK, initial=noise) as served, Client(served.url) as client:
        anna = served.member("anna", vector(size))
        call = client.begin("Download", [pb.DownloadRequest(session=session_of(anna), fraction=1.0)])
        export = client.begin("Export", [pb.ExportRequest()])
        time.sleep(0.1)
        started = time.monotonic()
        ben = served.member("ben", vector(size))
        assert len(ben.download(DownloadRequest(1.0))) > 3 * size
        assert time.monotonic() - started < 8.0
        # To look at the two is to take them: not before the server has had its time to give up.
        time.sleep(max(0.0, 1.0 - (time.monotonic() - started)))
        assert {outcome(call).error, outcome(export).error} == {"ServerUnavailableError"}


def test_a_transfer_ends_when_it_takes_too_long_or_another_takes_its_place() -> None:
    def slowly(session: str) -> Iterator[pb.Part]:
        yield pb.Part(session=session, total_bytes=20_000_000, data=bytes(4096))
        for _ in range(100):
            time.sleep(0.05)
            yield pb.Part(data=bytes(4096))

    limits = Limits(transfer_seconds=0.5)
    with serving(limits=limits) as served, Client(served.url) as client:
        anna = served.member("anna", vector(5_000_000))
        answer = outcome(client.begin("UploadParts", slowly(session_of(anna))))
        assert answer.error == "ServerUnavailableError" and "0.5 seconds" in answer.details
        first = client.begin("UploadParts", slowly(session_of(anna)))
        time.sleep(0.1)
        assert client.ask("UploadParts", pb.Part(session=session_of(anna))).error == "MalformedUpdateError"
        answer = outcome(first)
        assert answer.error == "ServerUnavailableError" and "another transfer" in answer.details


def test_an_endless_stream_is_cut_off_at_once() -> None:
    taken = itertools.count()

    def endless(session: str) -> Iterator[pb.Part]:
        yield pb.Part(session=session, total_bytes=4 * SIZE, data=bytes(4 * SIZE))
        while True:
            next(taken)
            yield pb.Part(data=bytes(2**20))

    with serving() as served, Client(served.url) as client:
        anna = served.member("anna")
        before = resident_bytes()
        for method in ("UploadParts", "OfferInitial") * 5:
            answer = outcome(client.begin(method, endless(session_of(anna))))
            assert answer.error == "LimitExceededError", answer
        # Client and server are both in this process; what is on its way is bounded by flow control.
        assert next(taken) < 500 and resident_bytes() - before < 200 * 2**20
        require_prompt(served)


def test_more_requests_than_there_may_be_are_turned_away_and_come_again() -> None:
    limits = Limits(max_requests=30, silence_seconds=1.0)
    with serving(limits=limits) as served, Client(served.url) as greedy, Client(served.url) as client:
        anna = served.member("anna")
        silent = [Pause() for _ in range(60)]
        calls = [greedy.begin("UploadParts", each) for each in silent]
        eventually(lambda: client.ask("Status", pb.StatusRequest()).error == "ServerUnavailableError")
        told: list[str] = []
        anna.tell = told.append
        assert anna.upload(encoded()).version == 1  # it is patient
        assert told and "answers again" in told[-1]
        assert {outcome(call).error for call in calls} == {"ServerUnavailableError"}
        for each in silent:
            each.over.set()


def test_many_streams_of_one_connection() -> None:
    with serving() as served, Client(served.url) as greedy:
        served.member("anna")
        silent = [Pause() for _ in range(400)]
        calls = [greedy.begin("UploadParts", each) for each in silent]
        require_prompt(served)
        for call in calls:
            call.cancel()
        for each in silent:
            each.over.set()


def test_connections_that_never_speak_cost_nobody_anything() -> None:
    with serving() as served:
        served.member("anna")
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        begun = [b"", b"\x16\x03\x01", preface, b"GET / HTTP/1.1\r\n\r\n", bytes(100)]
        open_ = []
        for number in range(300):
            connection = socket.create_connection(("127.0.0.1", served.port))
            connection.sendall(begun[number % len(begun)])
            open_.append(connection)
        require_prompt(served)
        for connection in open_:
            connection.close()
        require_prompt(served)


def test_uploads_per_minute() -> None:
    with serving(limits=Limits(uploads_per_minute=3)) as served:
        anna, ben = served.member("anna"), served.member("ben")
        for round_ in (1, 2, 3):
            anna.upload(encoded(round_=round_))
        before = seen(served.server)
        with pytest.raises(errors.LimitExceededError, match="3 times within a minute"):
            anna.upload(encoded(round_=4))
        assert seen(served.server) == before
        assert served.server.status().rejections == {"LimitExceededError": 1}
        assert ben.upload(encoded("ben")).version == 4


def test_max_members() -> None:
    with serving(max_members=2) as served:
        served.member("anna").leave()
        served.member("ben")
        with pytest.raises(errors.LimitExceededError, match="one more than the 2"):
            served.member("cleo")
        served.member("anna")  # comes back


def test_too_large_a_vector_is_refused_at_join() -> None:
    refused = pytest.raises(errors.JoinRefusedError, match="20 shared entries are more than the 19")
    with serving(limits=Limits(max_parameters=19)) as served, refused:
        served.member("anna")


def test_who_goes_away_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploads and downloads that nobody waits for any more, at random moments; with a disk in between."""
    chance = random.Random(1)
    size = 600_000
    with serving(state=StateDirectory(tmp_path / "state"), initial=np.zeros(size, np.float32)) as served:
        anna = served.member("anna", vector(size))
        values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        for round_ in range(1, 16):
            dense = encoded(round_=round_, size=size, indices=range(size), values=values)
            for message in (dense,) * 2:
                with Client(served.url) as client:
                    first, *others = messages.parts(message, session_of(anna))
                    limit = chance.uniform(0.001, 0.06)
                    call = client.begin("UploadParts", [first, *others], timeout=limit)
                    if chance.random() < 0.2:
                        call.cancel()
                    outcome(call)
                    request = pb.DownloadRequest(session=session_of(anna), fraction=1.0)
                    outcome(client.begin("Download", [request], timeout=limit))
            assert anna.upload(dense).round == round_
        assert served.server.version == 15
        assert served.server.status().uploads == 15
        np.testing.assert_allclose(served.server.parameters(), 15 * values, rtol=1e-5)
        require_prompt(served)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# Health and reflection


def test_health_and_reflection() -> None:
    with serving() as served, Client(served.url) as client:
        for service in ("", messages.SERVICE):
            raw = client.ask(f"/{HEALTH}/Check", health_pb2.HealthCheckRequest(service=service))
            assert health_pb2.HealthCheckResponse.FromString(raw.replies[0]).status == 1  # SERVING
        unknown = client.ask(f"/{HEALTH}/Check", health_pb2.HealthCheckRequest(service="other"))
        assert health_pb2.HealthCheckResponse.FromString(unknown.replies[0]).status == 3
        assert client.ask(f"/{HEALTH}/Check", b"\xff").error == "MalformedUpdateError"
        # A watch would last for ever.
        watch = client.ask(f"/{HEALTH}/Watch", health_pb2.HealthCheckRequest())
        assert watch.code == "UNIMPLEMENTED"
        ask: Any = reflection_pb2.ServerReflectionRequest
        kind = f"/{REFLECTION}/ServerReflectionInfo"
        answer = client.ask(kind, ask(list_services=""), ask(file_containing_symbol=messages.SERVICE))
        listed, described = map(reflection_pb2.ServerReflectionResponse.FromString, answer.replies)
        names = {each.name for each in listed.list_services_response.service}
        assert names == {messages.SERVICE, HEALTH, REFLECTION}
        assert described.file_descriptor_response.file_descriptor_proto
        assert client.ask(kind, b"\xff").replies == ()


def test_streams_of_reflection_keep_nobody_from_the_server() -> None:
    kind = f"/{REFLECTION}/ServerReflectionInfo"
    with serving(limits=Limits(max_requests=20)) as served, Client(served.url) as greedy:
        served.member("anna")
        silent = [Pause() for _ in range(90)]
        calls = [greedy.begin(kind, each) for each in silent]
        require_prompt(served)
        for call in calls:
            call.cancel()
        for each in silent:
            each.over.set()


def test_a_handshake_with_another_protocol_is_not_answered() -> None:
    with serving() as served, socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(PATIENT_SECONDS)
        answer = connection.recv(2**16)
        assert b"200 OK" not in answer


def test_a_refusal_gives_the_place_back() -> None:
    with serving(limits=Limits(max_transfers=1)) as served, Client(served.url) as client:
        empty = pb.Part(session=session_of(served.member("anna")))
        for _ in range(20):
            assert client.ask("UploadParts", empty).error == "MalformedUpdateError"
        require_prompt(served)
