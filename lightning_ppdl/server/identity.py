"""Who is calling: names that a client certificate or a bearer token proves. Knows no transport."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal
from urllib.parse import unquote_to_bytes

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.validation import require_name

log = logging.getLogger(__name__)

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_URI = b"ppdl:"


@dataclass(frozen=True)
class Identity:
    """The participant that a request comes from.

    Args:
        name: The participant's.
        how: What proves it. ``"nobody"``: nothing does, the name is what the caller says of itself.
    """

    name: str
    how: Literal["certificate", "token", "nobody"]


def new_token() -> str:
    """A bearer token: 256 secret random bits, as 64 hexadecimal digits."""
    return secrets.token_hex(32)


def hash_token(token: str) -> str:
    """``sha256:`` and 64 hexadecimal digits: what a server keeps of a token."""
    # Salt and a slow hash protect words that people choose, which can be guessed. A token is 256 random
    # bits: nobody guesses it, whatever the hash costs, and each request pays for the hash.
    return "sha256:" + hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class Tokens:
    """The participants' tokens, by their hashes. Never changes.

    Args:
        entries: Pairs of participant and :func:`hash_token` of a token. A participant may have several: while
            one is replaced, the old and the new are both good.

    Raises:
        ConfigurationError: for what is no name or no hash, or one hash under two names.
    """

    def __init__(self, entries: Iterable[tuple[str, str]] = ()) -> None:
        owners: dict[str, str] = {}
        for name, digest in entries:
            _add(owners, name, digest)
        self._entries = tuple((name, digest.encode()) for digest, name in owners.items())

    @classmethod
    def read(cls, path: str | Path) -> Tokens:
        """The tokens in a text file: a line each, the participant's name, a tab or a space, the hash.

        Blank lines and lines that begin with ``#`` are passed over. The last gap of a line is the separator,
        so names may hold spaces. A file without a token is allowed: then no token is good.

        Raises:
            ConfigurationError: if there is no such file, or for a line that is not of this form. No message
                repeats a line that is wrong: it could hold a token.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"there is no token file {path}: ppdl keys makes one, or write a line for each participant, "
                f"its name, a tab, and the hash of its token"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"the token file {path} cannot be read ({error}): give a text file in UTF-8, and the server "
                f"the right to read it"
            ) from error
        owners: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                name, *digest = text.rsplit(maxsplit=1)
                if not digest:
                    raise ConfigurationError(
                        "this is no name, a tab and a hash: write all three, or begin the line with # to "
                        "pass over it"
                    )
                _add(owners, name, digest[0])
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}, line {number}: {error}") from None
        return cls((name, digest) for digest, name in owners.items())

    def owner(self, token: str) -> str | None:
        """Whose ``token`` this is, None if nobody's. How long it takes tells nothing about the tokens."""
        digest = hash_token(token).encode()
        owner = None
        for name, known in self._entries:
            # Against every entry, also when one has matched: the place in the file is nobody's business.
            if hmac.compare_digest(known, digest):
                owner = name
        return owner

    @property
    def names(self) -> frozenset[str]:
        """The participants that have a token."""
        return frozenset(name for name, _ in self._entries)


class TokenFile:
    """The tokens of a file, which is read again when it changed: so one can be revoked without a restart.

    A changed file that cannot be read, or is wrong, changes nothing: the tokens that were good stay good,
    and an error is logged, once for each change. Thread-safe.

    Args:
        path: As :meth:`Tokens.read` takes it. Replace it in one step (write beside it, then ``mv``): half a
            file that happens to be well-formed counts as well.

    Raises:
        ConfigurationError: if the file is wrong from the beginning.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._guard = Lock()
        # Its state before it is read: what changes while it is being read is seen the next time.
        self._seen = _state(self.path)
        self._tokens = Tokens.read(self.path)
        warn_if_exposed(self.path)

    def owner(self, token: str) -> str | None:
        """Whose ``token`` this is, None if nobody's."""
        return self.tokens.owner(token)

    @property
    def tokens(self) -> Tokens:
        """What the file says now, or said when it was last right."""
        with self._guard:
            state = _state(self.path)
            if state != self._seen:
                self._seen = state
                try:
                    self._tokens = Tokens.read(self.path)
                except ConfigurationError as error:
                    log.error("%s. The tokens that were good before stay good until this is mended", error)
                else:
                    log.info("%s changed: tokens of %d participants", self.path, len(self._tokens.names))
                    warn_if_exposed(self.path)
            return self._tokens


def warn_if_exposed(path: str | Path) -> None:
    """Log a warning if others than its owner may read or write the token or key file at ``path``.

    Nothing happens for a file that is not there, or where files have no such permissions.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # who reads it next says so
    if os.name == "posix" and mode & 0o066:
        log.warning(
            "%s has the permissions %03o: others than its owner can read or change it; chmod 600 it",
            path,
            mode & 0o777,
        )


def certificate_names(auth_context: Mapping[str, Sequence[bytes]]) -> frozenset[str]:
    """The participants that the peer's certificate, which the transport has verified, speaks for.

    They are the URIs ``ppdl:NAME`` among its subject alternative names, with ``%20`` and the like decoded.
    If it has none, it is the common name. Names match exactly or not at all: no wildcards, and upper and
    lower case differ.

    Args:
        auth_context: As gRPC gives it: properties of the peer by name, each with its values.

    Returns:
        Empty without a certificate, and for names that are empty or no UTF-8. A certificate that has a URI
        ``ppdl:`` never speaks for its common name, not even if that URI names nobody.
    """
    # peer_uri, not x509_subject_alternative_name, which lists DNS names and addresses of mail as well and
    # doesn't tell them apart: what an authority signs as a host's name is not to become a participant's.
    uris = [value for value in auth_context.get("peer_uri", ()) if value[: len(_URI)].lower() == _URI]
    if uris:
        names = [unquote_to_bytes(uri[len(_URI) :]) for uri in uris]
    else:
        names = list(auth_context.get("x509_common_name", ()))
    return frozenset(text for name in names if (text := _text(name)))


def _add(owners: dict[str, str], name: str, digest: str) -> None:
    digest = digest.lower()
    if not _HASH.fullmatch(digest):
        raise ConfigurationError(
            "what follows the name is not sha256: and 64 hexadecimal digits: give the hash of the token, "
            "never the token itself"
        )
    require_name("name", name)  # repeats the name, so only when the hash was in its place
    if owners.setdefault(digest, name) != name:
        raise ConfigurationError(
            f"this is the hash of {owners[digest]!r} too, now of {name!r}: a token proves one name, so make "
            f"another for one of them"
        )


def _state(path: Path) -> tuple[int, ...] | None:
    """Changes whenever the file does; None if it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    # The inode for mv, and the time of the last change of anything for copies that keep the others.
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _text(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None
