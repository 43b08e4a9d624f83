"""Every request of somebody who proves nothing, or proves to be another: refused, and nothing changes."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from grpc_harness import (
    MANIFEST,
    SIZE,
    Client,
    Served,
    encoded,
    join_request,
    seen,
    serving,
    session_of,
)

from lightning_ppdl.backends.grpc import Credentials, GrpcBackend
from lightning_ppdl.keys import make_keys
from lightning_ppdl.records import DownloadRequest
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.identity import hash_token, new_token
from lightning_ppdl.server.protocol import RoundRobin
from lightning_ppdl.server.security import Security

Metadata = Sequence[tuple[str, Any]]
WAYS = ("certificates", "tokens", "both")
OPEN_TO_ALL = {"Status", "Export"}
"""What every participant may ask for, whoever it is."""


def requests(session: str) -> dict[str, Any]:
    """One of every kind, each as the owner of ``session`` would send it."""
    update, values = encoded("anna"), np.ones(SIZE, "<f4").tobytes()
    plain = pb.SessionRequest(session=session)
    return {
        "Join": join_request("anna"),
        "OfferInitial": pb.Part(session=session, total_bytes=len(values), data=values),
        "TakeTurn": pb.TakeTurnRequest(session=session),
        "RenewTurn": plain,
        "Download": pb.DownloadRequest(session=session, fraction=1.0),
        "Upload": pb.UploadRequest(session=session, update=update),
        "UploadParts": pb.Part(session=session, total_bytes=len(update), data=update),
        "EndTurn": plain,
        "Leave": plain,
        "Status": pb.StatusRequest(),
        "Export": pb.ExportRequest(),
    }


@dataclass(frozen=True)
class Keys:
    """The operator's directory, for a server that asks for certificates, tokens or both."""

    directory: Path
    way: str

    @property
    def security(self) -> Security:
        at = self.directory
        authority = None if self.way == "tokens" else at / "ca.pem"
        tokens = None if self.way == "certificates" else at / "tokens.txt"
        return Security(at / "server.pem", at / "server-key.pem", authority, tokens)

    def backend(self, url: str, name: str) -> GrpcBackend:
        at, certified = self.directory, self.way != "tokens"
        given = Credentials(
            at / "ca.pem",
            at / f"{name}.pem" if certified else None,
            at / f"{name}-key.pem" if certified else None,
            None if self.way == "certificates" else at / f"{name}.token",
        )
        return GrpcBackend(url, given)

    def bearer(self, name: str) -> Metadata:
        return [("authorization", f"Bearer {(self.directory / f'{name}.token').read_text().strip()}")]

    def channel(self, stem: str | None) -> grpc.ChannelCredentials:
        """With the certificate in ``stem``, or none."""
        read = [None, None] if stem is None else [f"{stem}-key.pem", f"{stem}.pem"]
        own = [None if name is None else (self.directory / name).read_bytes() for name in read]
        return grpc.ssl_channel_credentials((self.directory / "ca.pem").read_bytes(), *own)

    def certify(self, stem: str, subject: str | None, *uris: str) -> None:
        """Sign, as the authority would, a client's certificate with these names."""
        at = self.directory
        authority = x509.load_pem_x509_certificate((at / "ca.pem").read_bytes())
        signing = serialization.load_pem_private_key((at / "ca-key.pem").read_bytes(), None)
        assert isinstance(signing, ec.EllipticCurvePrivateKey)
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
        named = [] if subject is None else [x509.NameAttribute(NameOID.COMMON_NAME, subject)]
        builder = x509.CertificateBuilder(
            authority.subject,
            x509.Name(named),
            key.public_key(),
            x509.random_serial_number(),
            now - datetime.timedelta(hours=1),
            now + datetime.timedelta(days=1),
        ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        if uris:
            others = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(others, critical=False)
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (at / f"{stem}.pem").write_bytes(builder.sign(signing, hashes.SHA256()).public_bytes(pem))
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        (at / f"{stem}-key.pem").write_bytes(private)
        (at / f"{stem}-key.pem").chmod(0o600)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(directory, ["localhost", "127.0.0.1"], ["anna", "ben"])
    return directory


@pytest.fixture(params=WAYS)
def keys(request: pytest.FixtureRequest, directory: Path) -> Keys:
    return Keys(directory, request.param)


@contextmanager
def annas_turn(keys: Keys) -> Iterator[tuple[Served, str]]:
    """A server at which anna has the turn, and her session. Afterwards she can do all she could before."""
    with serving(keys.security, protocol=RoundRobin()) as served:
        anna = keys.backend(served.url, "anna")
        assert anna.join("anna", MANIFEST).needs_initial
        assert anna.offer_initial(np.zeros(SIZE, np.float32))
        anna.take_turn(5.0)
        yield served, session_of(anna)
        anna.close()


def require_refused(client: Client, served: Served, session: str, allowed: set[str], case: object) -> None:
    """All but the ``allowed`` kinds of request are, each is counted, and none changes anything."""
    before = seen(served.server)
    counted = served.server.status().rejections.get("AuthenticationError", 0)
    asked = {name: request for name, request in requests(session).items() if name not in allowed}
    for method, request in asked.items():
        answer = client.ask(method, request)
        found = answer.code, answer.error, answer.replies
        assert found == ("UNAUTHENTICATED", "AuthenticationError", ()), (case, method)
        assert session not in answer.details, (case, method)
        assert seen(served.server) == before, (case, method)
    assert served.server.status().rejections["AuthenticationError"] == counted + len(asked)


def test_every_kind_of_request_is_tried() -> None:
    service = pb.DESCRIPTOR.services_by_name[messages.SERVICE.rpartition(".")[2]]
    assert set(requests("")) == {method.name for method in service.methods}


def test_whoever_proves_its_name_takes_part(keys: Keys) -> None:
    with serving(keys.security, protocol=RoundRobin()) as served:
        for name in ("anna", "ben"):
            backend = keys.backend(served.url, name)
            if backend.join(name, MANIFEST).needs_initial:
                assert backend.offer_initial(np.zeros(SIZE, np.float32))
            backend.take_turn(5.0)
            backend.renew_turn()
            assert backend.download(DownloadRequest(1.0))
            receipt = backend.upload(encoded(name, base=served.server.version))
            assert receipt.round == 1
            backend.end_turn()
            assert backend.status().parameters == SIZE and backend.export()[0] == MANIFEST
            backend.leave()
        members = served.server.status().members
        assert [(member.name, member.present, member.rounds) for member in members] == [
            ("anna", False, 1),
            ("ben", False, 1),
        ]


def test_a_stolen_session_is_worth_nothing_to_another(keys: Keys) -> None:
    with annas_turn(keys) as (served, session):
        metadata = () if keys.way == "certificates" else keys.bearer("ben")
        with Client(served.url, keys.channel(None if keys.way == "tokens" else "ben"), metadata) as ben:
            require_refused(ben, served, session, OPEN_TO_ALL, keys.way)
            assert ben.ask("Status", pb.StatusRequest()).code == "OK"


@pytest.mark.parametrize("way", ["tokens", "both"])
def test_a_stolen_session_is_worth_nothing_without_a_token(directory: Path, way: str) -> None:
    keys = Keys(directory, way)
    (name, value), *_ = keys.bearer("anna")
    token = value.partition(" ")[2]
    headers: list[Metadata] = [
        (),
        [(name, "Bearer")],
        [(name, "Bearer " + "0" * 64)],
        [(name, f"Bearer {hash_token(token)}")],
        [(name, f"Bearer {token.upper()}")],
        [(name, f"Bearer {token[:-1]}")],
        [(name, f"Bearer {token},{token}")],
        [(name, f"Basic {token}")],
        [(name, token)],
        [("proxy-authorization", value)],
        [("authorization-bin", value.encode())],
        [(name, value), (name, "Bearer x")],
    ]
    with annas_turn(keys) as (served, session):
        for metadata in headers:
            with Client(served.url, keys.channel("anna" if way == "both" else None), metadata) as client:
                require_refused(client, served, session, set(), metadata)


def test_a_certificate_is_worth_nothing_with_the_token_of_another(directory: Path) -> None:
    keys = Keys(directory, "both")
    with annas_turn(keys) as (served, session):
        for certified, holding in (("anna", "ben"), ("ben", "anna")):
            with Client(served.url, keys.channel(certified), keys.bearer(holding)) as client:
                require_refused(client, served, session, set(), (certified, holding))


def test_certificates_of_the_authority_that_name_nobody_or_nearly_anna(directory: Path) -> None:
    keys = Keys(directory, "certificates")
    nobody: dict[str, tuple[str | None, ...]] = {
        "unnamed": (None,),
        "empty-uri": ("anna", "ppdl:"),
    }
    others = {
        "upper": ("Anna",),
        "wildcard": ("*",),
        "spaced": ("anna ",),
        "listed": ("anna,ben",),
        "other-uri": ("anna", "ppdl:ben"),
        "foreign-uri": ("ben", "https://anna"),
    }
    with annas_turn(keys) as (served, session):
        for stem, names in {**nobody, **others}.items():
            subject, *uris = names
            keys.certify(stem, subject, *(uri for uri in uris if uri))
            with Client(served.url, keys.channel(stem)) as client:
                require_refused(client, served, session, set() if stem in nobody else OPEN_TO_ALL, stem)
        keys.certify("by-uri", "ben", "ppdl:anna")
        with Client(served.url, keys.channel("by-uri")) as anna:
            assert anna.ask("RenewTurn", pb.SessionRequest(session=session)).code == "OK"


@pytest.mark.parametrize("way", ["tokens", "both"])
def test_a_revoked_token_ends_what_its_session_may_do(tmp_path: Path, way: str) -> None:
    keys = Keys(tmp_path / "keys", way)
    make_keys(keys.directory, ["127.0.0.1"], ["anna", "ben"])
    tokens, fresh = keys.directory / "tokens.txt", new_token()
    certified = "anna" if way == "both" else None
    with (
        annas_turn(keys) as (served, session),
        Client(served.url, keys.channel(certified), keys.bearer("anna")) as anna,
    ):
        assert anna.ask("RenewTurn", pb.SessionRequest(session=session)).code == "OK"
        lines = [line for line in tokens.read_text().splitlines() if not line.startswith("anna")]
        _replace(tokens, lines)
        require_refused(anna, served, session, set(), "revoked")
        # Another token of the same participant: the session is still hers.
        _replace(tokens, [*lines, f"anna\t{hash_token(fresh)}"])
        require_refused(anna, served, session, set(), "replaced")
        anna.metadata = [("authorization", f"Bearer {fresh}")]
        assert anna.ask("Upload", requests(session)["Upload"]).code == "OK"
    assert served.server.status().uploads == 1


def _replace(path: Path, lines: Sequence[str]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("".join(f"{line}\n" for line in lines))
    beside.chmod(0o600)
    os.replace(beside, path)
