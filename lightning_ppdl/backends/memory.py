"""``memory://NAME``: a parameter server in this very process, shared by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from lightning_ppdl.backends.base import Backend, split_url
from lightning_ppdl.errors import ConfigurationError, ServerClosedError, TurnTimeoutError
from lightning_ppdl.records import (
    DownloadRequest,
    Manifest,
    Membership,
    Receipt,
    ServerStatus,
    Vector,
)
from lightning_ppdl.server.core import ParameterServer

_servers: dict[str, ParameterServer] = {}
_lock = threading.Lock()


def serve(url: str, server: ParameterServer) -> ParameterServer:
    """Serve ``server`` under ``url`` (``memory://NAME``) to this process, and return it.

    Raises:
        ConfigurationError: if a server that is still open has that name.
    """
    name = _name(url)
    if not isinstance(server, ParameterServer) or server.closed:
        raise ConfigurationError(f"server={server!r} must be a ParameterServer that is not closed")
    server.open()
    with _lock:
        running = _servers.get(name)
        if running is not None and running is not server and not running.closed:
            raise ConfigurationError(
                f"{url!r} is being served already; end that one first with lightning_ppdl.close({url!r})"
            )
        _servers[name] = server
    return server


def close(url: str) -> None:
    """End the collaboration at ``url``; does nothing if there is none. Its name is free again."""
    with _lock:
        server = _servers.pop(_name(url), None)
    if server is not None:
        server.close()


def find(url: str) -> ParameterServer:
    """The open server under ``url``; one that nobody configured is made with the defaults
    (asynchronous, its default merge rule, which converges; anyone may join)."""
    name = _name(url)
    with _lock:
        if name not in _servers or _servers[name].closed:
            _servers[name] = ParameterServer()
        return _servers[name]


class Wait(Protocol):
    """How a participant's thread of control passes the time until something is ready."""

    def __call__(
        self, ready: Callable[[], bool], timeout_seconds: float, expiry: Callable[[], float]
    ) -> bool:
        """Return True as soon as ``ready()`` does, False after the timeout.

        Args:
            ready: May change its answer when somebody acts, and when time passes.
            timeout_seconds: The longest to wait.
            expiry: In how many seconds time alone may next change the answer.
        """


class MemoryBackend(Backend):
    """Calls the server's methods directly; every message still goes through the wire format.

    Args:
        url: ``memory://NAME``.
        server: The server; None to find it by name at join.
        wait: How to wait for a turn; None blocks this thread.
    """

    def __init__(self, url: str, server: ParameterServer | None = None, wait: Wait | None = None) -> None:
        super().__init__(url)
        _name(url)
        self._given = server
        self._joined: ParameterServer | None = None
        self._participant = self._session = ""
        self._wait = wait or self._block

    def join(self, participant: str, manifest: Manifest) -> Membership:
        server = self._given or find(self.url)
        membership = server.join(participant, manifest, self.url)
        self._joined, self._participant, self._session = server, participant, membership.session
        return membership

    def offer_initial(self, vector: Vector) -> bool:
        return self._server.offer_initial(self._session, vector)

    def take_turn(self, timeout_seconds: float) -> None:
        server = self._server
        ready = partial(server.take_turn, self._session)
        if not self._wait(ready, timeout_seconds, server.seconds_to_expiry):
            awaited = ", ".join(map(repr, server.status().awaited)) or "others to join"
            raise TurnTimeoutError(
                f"participant {self._participant!r} waited {timeout_seconds:g} seconds for its turn at "
                f"{self.url!r}, which is waiting for {awaited}"
            )

    def renew_turn(self) -> None:
        self._server.renew_turn(self._session)

    def end_turn(self) -> None:
        self._server.end_turn(self._session)

    def download(self, request: DownloadRequest) -> bytes:
        return self._server.download(self._session, request)

    def upload(self, message: bytes) -> Receipt:
        return self._server.upload(self._session, message)

    def leave(self) -> None:
        if self._joined is not None:
            self._joined.leave(self._session)
            self._joined = None

    def status(self) -> ServerStatus:
        return (self._joined or self._given or find(self.url)).status()

    def export(self) -> tuple[Manifest, bytes]:
        return (self._joined or self._given or find(self.url)).export()

    @property
    def _server(self) -> ParameterServer:
        if self._joined is None:
            raise ServerClosedError(f"not connected to {self.url!r}: join() first")
        return self._joined

    def _block(self, ready: Callable[[], bool], timeout_seconds: float, expiry: Callable[[], float]) -> bool:
        deadline = time.monotonic() + timeout_seconds
        changed = self._server.changed
        with changed:
            while not ready():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                # Woken by every change of turn, but not by leases that run out silently. The server's
                # clock need not be this one: look again after a second in any case.
                changed.wait(min(remaining, 1.0, max(0.01, expiry())))
        return True


def _name(url: str) -> str:
    parts = split_url(url)
    if parts.scheme != "memory" or not parts.netloc or parts.path not in ("", "/"):
        raise ConfigurationError(f"server={url!r} must have the form 'memory://NAME'")
    return parts.netloc
