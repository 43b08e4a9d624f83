"""Who may speak to a gRPC server, and under which name; with certificates, tokens, and both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_harness import (
    MANIFEST,
    SIZE,
    Client,
    Pause,
    Served,
    encoded,
    eventually,
    join_request,
    outcome,
    seen,
    serving,
    session_of,
)
from grpc_proofs import NAMES, WAYS, backend, credentials, made_in, security, thief

from lightning_ppdl import errors
from lightning_ppdl.backends.grpc import Credentials
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.protocol import RoundRobin
from lightning_ppdl.server.security import Limits


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names, by another authority."""
    return made_in(tmp_path_factory.mktemp("foreign") / "keys")


@pytest.fixture(scope="module", params=WAYS)
def proved(request: pytest.FixtureRequest, keys: Path) -> Iterator[tuple[str, Served]]:
    with serving(security(keys, request.param), initial=np.zeros(SIZE, np.float32)) as served:
        yield request.param, served


def test_everybody_under_its_own_name(proved: tuple[str, Served], keys: Path) -> None:
    way, served = proved
    for name in NAMES:
        client = backend(served.url, credentials(keys, name, way))
        round_ = client.join(name, MANIFEST).last_round + 1
        assert client.upload(encoded(name, round_)).round == round_
        assert client.status().parameters == SIZE
        client.leave()


def test_nobody_acts_for_another_even_with_its_session(proved: tuple[str, Served], keys: Path) -> None:
    way, served = proved
    victim = backend(served.url, credentials(keys, "clinic-a", way))
    done = victim.join("clinic-a", MANIFEST).last_round
    session = session_of(victim)
    update = encoded("clinic-a", done + 1)
    values = np.zeros(SIZE, "<f4").tobytes()
    before = seen(served.server)
    counted = served.server.status().rejections.get("AuthenticationError", 0)
    attempts: list[tuple[str, Any]] = [
        ("Join", join_request("clinic-a")),
        ("OfferInitial", pb.Part(session=session, total_bytes=len(values), data=values)),
        ("TakeTurn", pb.TakeTurnRequest(session=session)),
        ("RenewTurn", pb.SessionRequest(session=session)),
        ("EndTurn", pb.SessionRequest(session=session)),
        ("Download", pb.DownloadRequest(session=session, fraction=1.0)),
        ("Upload", pb.UploadRequest(session=session, update=update)),
        ("UploadParts", pb.Part(session=session, total_bytes=len(update), data=update)),
        ("Leave", pb.SessionRequest(session=session)),
    ]
    with thief(served, keys, "clinic-b", way) as client:
        for method, request in attempts:
            answer = client.ask(method, request)
            assert (answer.code, answer.error) == ("UNAUTHENTICATED", "AuthenticationError"), method
            assert "'clinic-b'" in answer.details and session not in answer.details
    assert seen(served.server) == before
    assert served.server.status().rejections["AuthenticationError"] == counted + len(attempts)
    # Its own session and another's update.
    own = backend(served.url, credentials(keys, "clinic-b", way))
    own.join("clinic-b", MANIFEST)
    with pytest.raises(errors.AuthenticationError, match="nobody uploads for another"):
        own.upload(update)
    assert victim.upload(update).round == done + 1
    own.leave()
    victim.leave()


def test_whoever_proves_nothing_is_refused(proved: tuple[str, Served], keys: Path, foreign: Path) -> None:
    way, served = proved
    before = seen(served.server)
    nobody = Credentials(keys / "ca.pem")
    impostor = credentials(foreign, "clinic-a", way)
    impostor = Credentials(keys / "ca.pem", impostor.certificate, impostor.key, impostor.token_file)
    expected = errors.AuthenticationError if way == "tokens" else errors.ServerUnavailableError
    for given in (nobody, impostor):
        client = backend(served.url, given)
        for act in (lambda: client.join("clinic-a", MANIFEST), client.status, client.export):  # noqa: B023
            with pytest.raises(expected):
                act()
        client.close()
    assert seen(served.server) == before


def test_a_token_and_a_certificate_of_two_participants(keys: Path) -> None:
    with serving(security(keys, "both")) as served:
        given = credentials(keys, "clinic-a")
        mixed = Credentials(given.ca, given.certificate, given.key, keys / "clinic-b.token")
        for name in ("clinic-a", "clinic-b"):
            with pytest.raises(errors.AuthenticationError, match="of the same participant"):
                backend(served.url, mixed).join(name, MANIFEST)


def test_nobody_without_a_token_keeps_a_request_open(keys: Path) -> None:
    """It is refused before it has sent anything, and so takes up none of the places."""

    with serving(security(keys, "tokens"), Limits(max_requests=5)) as served:
        channel = grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes())
        silent = Pause()
        with Client(served.url, channel) as client:
            for method in ("Join", "UploadParts", "TakeTurn", "Download") * 5:
                assert outcome(client.begin(method, silent)).code == "UNAUTHENTICATED"
        silent.over.set()


def test_one_participant_takes_a_bounded_share(keys: Path) -> None:
    limits = Limits(max_requests_each=3)
    with serving(security(keys, "tokens"), limits, protocol=RoundRobin()) as served:
        first = backend(served.url, credentials(keys, "clinic-b", "tokens"))
        first.join("clinic-b", MANIFEST)
        first.take_turn(5.0)
        greedy = backend(served.url, credentials(keys, "clinic-a", "tokens"))
        greedy.join("clinic-a", MANIFEST)
        wait = pb.TakeTurnRequest(session=session_of(greedy), wait_seconds=20.0)
        with thief(served, keys, "clinic-a", "tokens") as client:
            calls = [client.begin("TakeTurn", [wait]) for _ in range(10)]
            eventually(lambda: sum(each.done() for each in calls) == 7)
            refused = [outcome(each).error for each in calls if each.done()]
            assert refused == ["LimitExceededError"] * 7
            first.renew_turn()
            for each in calls:
                each.cancel()
