"""How a participant knows its server, and proves itself to it: files, given by name or behind a URL."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from urllib.parse import parse_qsl

from lightning_ppdl.errors import ConfigurationError


@dataclass(frozen=True)
class Credentials:
    """How a participant knows its server, and proves itself to it. All are paths.

    Args:
        ca: PEM file of the authority that signed the server's certificate; None for those that gRPC trusts.
        certificate, key: PEM files of this participant, for a server that asks for a certificate.
        token_file: Holds this participant's token.
        allow_plaintext_token: Send the token over ``grpc://`` to another machine: only where something else
            encrypts the way.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    token_file: str | Path | None = None
    allow_plaintext_token: bool = False

    def require_fitting(self, url: str, encrypted: bool) -> None:
        """Raise ConfigurationError for files that the connection to ``url`` would not, or could not, use."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError(
                f"certificate={_shown(self.certificate)} and key={_shown(self.key)}: to prove itself with "
                f"TLS, a participant needs both"
            )
        for name in ("ca", "certificate"):
            if getattr(self, name) is not None and not encrypted:
                raise ConfigurationError(
                    f"{name}={_shown(getattr(self, name))} with server={url!r}: this address is not "
                    f"encrypted, and nobody proves anything with it; use grpcs://"
                )

    def token(self) -> str | None:
        """What the token file holds, None without one.

        Raises:
            ConfigurationError: if that is no token. The message does not repeat it.
        """
        raw = self.read("token_file")
        if raw is None:
            return None
        token = raw.strip()
        if not token or any(not 0x21 <= byte <= 0x7E for byte in token):
            raise ConfigurationError(
                f"token_file={_shown(self.token_file)} holds no token: one line of letters and digits, as "
                f"ppdl keys makes it"
            )
        return token.decode("ascii")

    def read(self, name: str) -> bytes | None:
        """The content of one of the files, None where it was not given.

        Raises:
            ConfigurationError: if it cannot be read.
        """
        path = getattr(self, name)
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"{name}={str(path)!r} cannot be read ({error.strerror or error}); give the path of the file "
                f"that the server's operator made for you"
            ) from error


def from_query(url: str, query: str) -> Credentials:
    """The credentials that stand behind an address, as ``ca=PATH&certificate=PATH&...``.

    Args:
        url: The whole of it, for messages.
        query: What stands behind its question mark; empty for none.

    Raises:
        ConfigurationError: for a name that is no argument of :class:`Credentials`, or a value it cannot have.
    """
    given = dict(parse_qsl(query, keep_blank_values=True))
    known = [field.name for field in fields(Credentials)]
    if unknown := set(given) - set(known):
        raise ConfigurationError(f"server={url!r}: {unknown.pop()!r} is none of {', '.join(known)}")
    allow = given.pop("allow_plaintext_token", "false").lower()
    if allow not in ("true", "false"):
        raise ConfigurationError(f"server={url!r}: allow_plaintext_token={allow!r} must be true or false")
    return replace(Credentials(**given), allow_plaintext_token=allow == "true")  # type: ignore[arg-type]


def _shown(path: object) -> str:
    return repr(None if path is None else str(path))
