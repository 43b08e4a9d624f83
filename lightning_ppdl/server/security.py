"""Who may speak to a gRPC server, and what each may use of it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ppdl.errors import AuthenticationError, ConfigurationError
from lightning_ppdl.server.identity import TokenFile, certificate_names, warn_if_exposed
from lightning_ppdl.validation import require_count, require_positive


@dataclass(frozen=True)
class Limits:
    """What clients may use of a server.

    Args:
        uploads_per_minute: Of one participant, those that are sent again included; None for any number.
        transfer_seconds: The longest that one upload or download may take.
        silence_seconds: The longest that a client may neither send nor take anything in the middle of a
            request.
        max_transfers: How many of them, larger than a mebibyte, may be under way at once.
        max_requests: How many requests may be under way at once, those that wait for a turn included.
        max_requests_each: How many of them may be of one participant, where there are certificates or tokens.
        max_parameters: The most entries that a collaboration may share (P).
    """

    uploads_per_minute: int | None = None
    transfer_seconds: float = 600.0
    silence_seconds: float = 30.0
    max_transfers: int = 8
    max_requests: int = 1000
    max_requests_each: int = 20
    max_parameters: int = 4_000_000_000

    def __post_init__(self) -> None:
        if self.uploads_per_minute is not None:
            require_count("uploads_per_minute", self.uploads_per_minute)
        for name in ("transfer_seconds", "silence_seconds"):
            require_positive(name, getattr(self, name))
        for name in ("max_transfers", "max_requests", "max_requests_each", "max_parameters"):
            require_count(name, getattr(self, name))


@dataclass(frozen=True)
class Security:
    """How a server proves itself, and how participants prove themselves to it.

    With ``client_ca`` each needs a certificate that this authority signed and that names it; with ``tokens``
    a token; with both, both of the same participant. With neither, everybody is believed.

    Args:
        certificate, key: PEM files of the server; without them nothing is encrypted.
        client_ca: PEM file of the authority whose certificates prove participants.
        tokens: File of the tokens' hashes (:class:`~lightning_ppdl.server.identity.TokenFile`).
        allow_plaintext_tokens: Accept tokens without TLS, from beyond this machine too: only where something
            else encrypts the way.

    Raises:
        ConfigurationError: for files that cannot be read, or settings that do not go together.
    """

    certificate: str | Path | None = None
    key: str | Path | None = None
    client_ca: str | Path | None = None
    tokens: str | Path | None = None
    allow_plaintext_tokens: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError(
                f"certificate={_shown(self.certificate)} and key={_shown(self.key)}: TLS needs both; ppdl "
                f"keys makes them for a trial"
            )
        if self.client_ca is not None and self.certificate is None:
            raise ConfigurationError(
                f"client_ca={_shown(self.client_ca)}: participants' certificates need TLS; give "
                f"certificate and key too"
            )
        for name in ("certificate", "key", "client_ca", "tokens"):
            path = getattr(self, name)
            if path is not None:
                read_file(name, path)
        if self.key is not None:
            warn_if_exposed(self.key)

    @property
    def encrypted(self) -> bool:
        """Whether the server speaks TLS."""
        return self.certificate is not None

    @property
    def open(self) -> bool:
        """Whether everybody is believed."""
        return self.client_ca is None and self.tokens is None

    def require_safe(self, host: str) -> None:
        """Raise ConfigurationError if tokens would travel in the clear from beyond this machine."""
        exposed = self.tokens is not None and not self.encrypted and not is_loopback(host)
        if exposed and not self.allow_plaintext_tokens:
            raise ConfigurationError(
                f"tokens={_shown(self.tokens)} without TLS on {host!r}: whoever listens on the way could "
                f"upload as anybody. Give certificate and key, listen on 127.0.0.1, or, where something else "
                f"encrypts the way, give allow_plaintext_tokens=true"
            )


class Gate:
    """Tells which participants a caller may act as.

    Args:
        security: What proves a name.
    """

    def __init__(self, security: Security) -> None:
        self._by_certificate = security.client_ca is not None
        self._tokens = None if security.tokens is None else TokenFile(security.tokens)

    def names(
        self, auth_context: Mapping[str, Sequence[bytes]], metadata: Sequence[tuple[str, str | bytes]]
    ) -> frozenset[str] | None:
        """The participants that a caller may act as; None where everybody is believed.

        Args:
            auth_context: Of its connection, as gRPC gives it.
            metadata: Of its request; the token is in ``authorization``, as ``Bearer TOKEN``.

        Raises:
            AuthenticationError: if there are none.
        """
        proved = None
        if self._by_certificate:
            proved = certificate_names(auth_context)
            if not proved:
                raise AuthenticationError(
                    "the certificate names no participant: it needs one as its common name, or as a URI "
                    "ppdl:NAME"
                )
        if self._tokens is not None:
            token = _bearer_token(metadata)
            owner = self._tokens.owner(token) if token else None
            if owner is None:
                raise AuthenticationError(
                    "no token, or one that this server does not know: give the token file that its operator "
                    "made for you"
                )
            if proved is not None and owner not in proved:
                raise AuthenticationError(
                    f"this token is {owner!r}'s, and the certificate {_listed(proved)}'s: give a token and a "
                    f"certificate of the same participant"
                )
            proved = frozenset({owner})
        return proved


def require_acting_as(name: str, proved: frozenset[str] | None) -> None:
    """Raise AuthenticationError unless a caller with the names that :meth:`Gate.names` gave may act as
    ``name``."""
    if proved is not None and name not in proved:
        raise AuthenticationError(
            f"this certificate or token is {_listed(proved)}'s, not {name!r}'s; nobody acts for another"
        )


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, can be reached from this machine alone."""
    bare = host.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare.lower() == "localhost"


def split_address(name: str, address: str) -> tuple[str, int]:
    """Host and port of ``"HOST:PORT"``.

    Raises:
        ConfigurationError: naming the argument ``name``, if it is none.
    """
    host, colon, port = str(address).rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535 or "/" in host:
        raise ConfigurationError(
            f"{name}={address!r} must be HOST:PORT, e.g. {name}=0.0.0.0:50051 for all of this machine's "
            f"addresses, or {name}=127.0.0.1:50051 for this machine alone"
        )
    return host, int(port)


def read_file(name: str, path: str | Path) -> bytes:
    """The content of the file that the argument ``name`` gives.

    Raises:
        ConfigurationError: if it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{name}={_shown(path)} cannot be read ({error.strerror or error}); give the path of a file that "
            f"this process may read"
        ) from error


def _bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Empty if there is none. Of several, which one counts would be a guess: then there is none either."""
    given = [value for key, value in metadata if key == "authorization"]
    if len(given) != 1 or not isinstance(given[0], str):
        return ""
    scheme, _, token = given[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _listed(names: frozenset[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _shown(path: object) -> str:
    return repr(None if path is None else str(path))
