"""Certificates, tokens, and clients that show their own or somebody else's."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_harness import Client, Served

from lightning_ppdl.backends.grpc import Credentials, GrpcBackend
from lightning_ppdl.keys import make_keys
from lightning_ppdl.server.security import Security

HOSTS, NAMES = ["localhost", "127.0.0.1"], ["clinic-a", "clinic-b", "Klinik Süd"]
WAYS = ("certificates", "tokens", "both")


def security(keys: Path, way: str) -> Security:
    return Security(
        keys / "server.pem",
        keys / "server-key.pem",
        None if way == "tokens" else keys / "ca.pem",
        None if way == "certificates" else keys / "tokens.txt",
    )


def credentials(keys: Path, name: str, way: str = "both") -> Credentials:
    certified = way != "tokens"
    return Credentials(
        keys / "ca.pem",
        keys / f"{name}.pem" if certified else None,
        keys / f"{name}-key.pem" if certified else None,
        None if way == "certificates" else keys / f"{name}.token",
    )


def backend(url: str, given: Credentials) -> GrpcBackend:
    made = GrpcBackend(url, given)
    made.patience_seconds = 0.0
    return made


def thief(served: Served, keys: Path, name: str, way: str) -> Client:
    """A participant with proofs of its own that says whatever it likes."""
    own = (keys / f"{name}-key.pem").read_bytes(), (keys / f"{name}.pem").read_bytes()
    channel = grpc.ssl_channel_credentials(
        (keys / "ca.pem").read_bytes(), *(own if way != "tokens" else (None, None))
    )
    token = (keys / f"{name}.token").read_text().strip()
    header = ("authorization", f"Bearer {token}")
    return Client(served.url, channel, () if way == "certificates" else [header])


def made_in(directory: Path) -> Path:
    """A directory of keys for all names."""
    make_keys(directory, HOSTS, NAMES)
    return directory
