"""Tokens that are none, and what participants and servers themselves refuse to do."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from grpc_harness import (
    MANIFEST,
    SIZE,
    Client,
    encoded,
    join_request,
    seen,
    serving,
)
from grpc_proofs import HOSTS, backend, credentials, made_in, security, thief

from lightning_ppdl import connect, errors
from lightning_ppdl.backends.grpc import Credentials, GrpcBackend
from lightning_ppdl.keys import make_keys
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.identity import hash_token
from lightning_ppdl.server.security import Security
from lightning_ppdl.server.service import GrpcService


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names, by another authority."""
    return made_in(tmp_path_factory.mktemp("foreign") / "keys")


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "Bearer",
        "Bearer ",
        "Bearer  ",
        "Basic {}",
        "Bearer: {}",
        "Bearer {} {}",
        "Bearer {}x",
        "Bearer x{}",
        "bearer:{}",
        "Bearer " + "x" * 10_000,
    ],
)
def test_headers_that_hold_no_token(keys: Path, header: str) -> None:
    with serving(security(keys, "tokens")) as served:
        token = (keys / "clinic-a.token").read_text().strip()
        with thief(served, keys, "clinic-a", "tokens") as client:
            client.metadata = [("authorization", header.replace("{}", token))]
            answer = client.ask("Join", join_request("clinic-a"))
            assert (answer.code, answer.error) == ("UNAUTHENTICATED", "AuthenticationError")
            assert token not in answer.details


def test_two_tokens_in_one_request_are_none(keys: Path) -> None:
    with serving(security(keys, "tokens")) as served, thief(served, keys, "clinic-a", "tokens") as client:
        assert client.ask("Join", join_request("clinic-a")).code == "OK"
        client.metadata = list(client.metadata) * 2
        assert client.ask("Join", join_request("clinic-a")).error == "AuthenticationError"


def test_the_hash_of_no_token_lets_nobody_in(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(f"clinic-a\t{hash_token('')}\n")
    with serving(Security(tokens=tokens)) as served:
        for metadata in ((), [("authorization", "Bearer ")]):
            with Client(served.url, metadata=metadata) as client:
                assert client.ask("Join", join_request("clinic-a")).error == "AuthenticationError"


def test_a_revoked_token_is_refused_at_the_next_request(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_keys(keys, HOSTS, ["clinic-a", "clinic-b"])
    with serving(security(keys, "tokens")) as served:
        clients = {}
        for name in ("clinic-a", "clinic-b"):
            clients[name] = backend(served.url, credentials(keys, name, "tokens"))
            if clients[name].join(name, MANIFEST).needs_initial:
                clients[name].offer_initial(np.zeros(SIZE, np.float32))
        lines = (keys / "tokens.txt").read_text().splitlines(keepends=True)
        changed = keys / "changed"
        changed.write_text("".join(line for line in lines if not line.startswith("clinic-a")))
        os.replace(changed, keys / "tokens.txt")
        before = seen(served.server)
        with pytest.raises(errors.AuthenticationError):
            clients["clinic-a"].upload(encoded("clinic-a"))
        assert seen(served.server) == before
        assert clients["clinic-b"].upload(encoded("clinic-b")).version == 1


# What a participant itself refuses to do


def test_a_client_sends_no_token_in_the_clear(keys: Path) -> None:
    given = Credentials(token_file=keys / "clinic-a.token")
    with pytest.raises(errors.ConfigurationError, match="in the clear"):
        GrpcBackend("grpc://server.example:50051", given).join("clinic-a", MANIFEST)
    with serving(Security(tokens=keys / "tokens.txt")) as served:  # on this machine it may
        assert served.url.startswith("grpc://")
        assert backend(served.url, given).join("clinic-a", MANIFEST).version == 0


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"a\nb", "Süd".encode(), b"\xff", b"a\0b"])
def test_files_that_hold_no_token(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    client = connect(f"grpc://127.0.0.1:1?token_file={tmp_path / 'token'}")
    with pytest.raises(errors.ConfigurationError, match="holds no token") as raised:
        client.status()
    assert not content.strip() or content.decode("latin-1") not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("grpc://127.0.0.1:1?ca=x", "use grpcs://"),
        ("grpc://127.0.0.1:1?certificate=x&key=y", "use grpcs://"),
        ("grpcs://127.0.0.1:1?certificate=x", "needs both"),
        ("grpcs://127.0.0.1:1?key=x", "needs both"),
        ("grpcs://127.0.0.1:1?certificat=x", "'certificat' is none of"),
        ("grpcs://me:secret@127.0.0.1:1", "must have the form"),
        ("grpcs://127.0.0.1:1#x", "must have the form"),
        ("grpcs://127.0.0.1:99999", "must have the form"),
        ("grpcs://127.0.0.1", "must have the form"),
        ("grpcs://127.0.0.1:1/path", "must have the form"),
        ("grpc://127.0.0.1:1?allow_plaintext_token=yes", "must be true or false"),
    ],
)
def test_addresses_that_would_not_do_what_they_say(url: str, named: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=named):
        connect(url)


def test_what_cannot_become_right_is_not_tried_again(keys: Path, foreign: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("garbage")
    told: list[str] = []
    with serving(security(keys, "tokens")) as served, serving() as plain:
        no_tls = plain.url.replace("grpc", "grpcs")
        for url, given, error, named in (
            (served.url, Credentials(foreign / "ca.pem"), errors.AuthenticationError, "did not prove"),
            (no_tls, Credentials(keys / "ca.pem"), errors.ConfigurationError, "TLS"),
            (served.url, Credentials(garbage), errors.ConfigurationError, "PEM"),
            (
                served.url,
                Credentials(keys / "ca.pem", keys / "clinic-a.pem", keys / "clinic-b-key.pem"),
                errors.ConfigurationError,
                "PEM",
            ),
        ):
            client = GrpcBackend(url, given)  # with all its patience
            client.tell = told.append
            with pytest.raises(error, match=named):
                client.status()
            client.close()
    assert told == []


# What a server itself refuses to be


def test_tokens_in_the_clear_are_only_for_this_machine(keys: Path) -> None:
    tokens = Security(tokens=keys / "tokens.txt")
    for address in ("0.0.0.0:0", "[::]:0", "server.example:0", "10.0.0.1:0"):
        with pytest.raises(errors.ConfigurationError, match="allow_plaintext_tokens"):
            GrpcService(ParameterServer(), address, tokens)
    for address in ("127.0.0.1:0", "localhost:0", "[::1]:0"):
        GrpcService(ParameterServer(), address, tokens)
    told = Security(tokens=keys / "tokens.txt", allow_plaintext_tokens=True)
    GrpcService(ParameterServer(), "0.0.0.0:0", told)


def test_certificates_that_do_not_fit_are_said_at_the_start(keys: Path) -> None:
    wrong = Security(keys / "server.pem", keys / "clinic-a-key.pem")
    service = GrpcService(ParameterServer(), "127.0.0.1:0", wrong)
    with pytest.raises(errors.ConfigurationError, match="belong together"):
        service.start()


def test_paths_of_the_server_stay_at_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "secret-place.safetensors"
    with caplog.at_level(logging.ERROR), serving(initial=missing) as served, Client(served.url) as client:
        answer = client.ask("Join", join_request("anna"))
        assert answer.error == "ServerFailedError" and "secret-place" not in answer.details
        assert served.server.status().members == ()
    assert "secret-place" in caplog.text
