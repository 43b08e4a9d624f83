"""Serve the status over HTTP to people and to Prometheus, on a port of its own."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server.observe.guard import Guard, require_password
from lightning_ppdl.server.observe.status import ServiceStatus

if TYPE_CHECKING:
    from lightning_ppdl.server.observe.listener import Listener


class StatusService:
    """Answers ``/`` (a page), ``/metrics`` (Prometheus), ``/status.json`` and ``/health`` ("ok").

    None of them shows the value of any parameter, but all except ``/health`` show who takes part. So the
    service listens on loopback only, unless it has a password; every user name goes with it. The password
    travels as clear text: beyond a network that you trust, put a proxy with TLS before it.

    A client that is slow or silent holds one connection for 10 seconds at most, and makes room earlier if
    others come.

    Args:
        status: What to show now; called for each answer, from several threads.
        host: Where to listen: an address of this machine, or a name of one.
        port: 0 takes a free one.
        password: At least 8 characters; None for no authentication.

    Raises:
        ConfigurationError: if ``host`` is not loopback and there is no password, for a port that is none,
            or without the package ``prometheus_client``.
    """

    def __init__(
        self,
        status: Callable[[], ServiceStatus],
        host: str = "127.0.0.1",
        port: int = 0,
        password: str | None = None,
    ) -> None:
        # Not at the top, as a server without this service does not need prometheus_client; and not in
        # start(), so that the lack of it is known before anything is served.
        from lightning_ppdl.server.observe.listener import Listener

        if not isinstance(host, str) or not host:
            raise ConfigurationError(f"host={host!r} must be an address to listen on, e.g. host='127.0.0.1'")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ConfigurationError(f"port={port!r} must be a whole number from 0 (any free one) to 65535")
        self._password = None if password is None else require_password(password)
        if self._password is None and not _is_loopback(host):
            raise _unprotected(host)
        self._listen = Listener
        self._status = status
        self._host = host
        self._port = port
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen from now on, in a thread of its own. Does nothing if it does already.

        Raises:
            ConfigurationError: if it cannot listen at this host and port.
        """
        if self._listener is not None:
            return
        try:
            family, *_, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise self._unavailable(error) from error
        loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        # A name is loopback only if what it stands for is.
        if self._password is None and not loopback:
            raise _unprotected(self._host)
        guard = Guard(self._password, own_hosts=(self._host,) if loopback else None)
        try:
            self._listener = self._listen(family, address, self._status, guard)
        except OSError as error:
            raise self._unavailable(error) from error
        self._thread = threading.Thread(target=self._listener.serve, name="ppdl-status", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all connections and free the port. Does nothing if it does not listen."""
        listener, thread = self._listener, self._thread
        self._listener = self._thread = None
        if listener is not None and thread is not None:
            listener.shutdown()
            thread.join()
            listener.server_close()

    @property
    def url(self) -> str:
        """Where the page is, e.g. ``http://127.0.0.1:9464/``.

        Raises:
            ConfigurationError: before :meth:`start` and after :meth:`stop`.
        """
        if self._listener is None:
            raise ConfigurationError("the status service has no address while it is stopped; call start()")
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._listener.server_address[1]}/"

    def __enter__(self) -> StatusService:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _unavailable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"the status service cannot listen at host={self._host!r}, port={self._port}: "
            f"{error.strerror or error}; give a free port, or port=0 for any, and an address of this machine"
        )


def _is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address, or the name of one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _unprotected(host: str) -> ConfigurationError:
    return ConfigurationError(
        f"host={host!r} can be reached from other machines, and the status shows who takes part: give a "
        f"password, or host='127.0.0.1'"
    )
