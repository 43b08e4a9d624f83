"""Who may see the status: requests meant for this machine, and those that know the password."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Sequence
from email.message import Message

from lightning_ppdl.errors import ConfigurationError

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_FEWEST = 8


def require_password(password: str) -> str:
    """Return ``password`` if it is a string of 8 characters or more. The error does not repeat it."""
    if not isinstance(password, str) or len(password) < _FEWEST:
        raise ConfigurationError(
            f"password=(hidden) must be a string of {_FEWEST} characters or more; one is made by: "
            f"openssl rand -base64 18"
        )
    return password


class Guard:
    """Checks the headers of a request.

    Args:
        password: None lets everyone see the status.
        own_hosts: The service listens on loopback, under these names too, and must be addressed by a name
            of loopback. Else a web page from elsewhere could point a name of its own at 127.0.0.1 and have
            its visitor's browser read the status (DNS rebinding). None for other addresses: there the
            password sees to it, as a browser does not send it to another name.
    """

    def __init__(self, password: str | None, own_hosts: Sequence[str] | None) -> None:
        self._digest = None if password is None else _digest(password.encode())
        self._hosts: frozenset[str] | None = None
        if own_hosts is not None:
            bracketed = (f"[{host}]" if ":" in host else host for host in own_hosts)
            self._hosts = frozenset(host.lower() for host in (*_LOOPBACK, *bracketed))

    def addresses_us(self, headers: Message) -> bool:
        """Whether the request was meant for this service: exactly one ``Host``, any port."""
        if self._hosts is None:
            return True
        hosts = headers.get_all("Host", [])
        return len(hosts) == 1 and re.sub(r":\d*$", "", str(hosts[0]).strip()).lower() in self._hosts

    def knows_password(self, headers: Message) -> bool:
        """Whether the request carries the password, with any user name; compared in constant time."""
        if self._digest is None:
            return True
        scheme, _, credentials = str(headers.get("Authorization", "")).strip().partition(" ")
        try:
            decoded = base64.b64decode(credentials.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        password = decoded.partition(b":")[2]
        return scheme.lower() == "basic" and hmac.compare_digest(_digest(password), self._digest)


def _digest(password: bytes) -> bytes:
    """Of one length for all, since comparing tells lengths apart."""
    return hashlib.sha256(password).digest()
