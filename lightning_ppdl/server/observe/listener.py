"""The HTTP server: a thread for each connection, and bounds on their number, their size and their time."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import HTTPServer
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from lightning_ppdl.server.observe.guard import Guard
from lightning_ppdl.server.observe.handler import CONNECTION_SECONDS, Handler
from lightning_ppdl.server.observe.status import ServiceStatus

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 32
"""How many are open at one time at most."""

_POLL_SECONDS = 0.25
_CLOSING_SECONDS = 2.0


class Listener(ThreadingMixIn, HTTPServer):
    """Binds in its constructor; :meth:`serve` answers until ``shutdown()``.

    When the most connections are open, the oldest is ended for a new one: an answer takes milliseconds, so
    the oldest is one that is silent. Whoever sends or reads a byte now and then is ended like them.

    Args:
        family: Of the address: ``AF_INET`` or ``AF_INET6``.
        address: Where to listen, as ``getaddrinfo`` gives it.
        status: What to show now.
        guard: Who may see it.

    Raises:
        OSError: if it cannot listen there.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, family: int, address: Any, status: Callable[[], ServiceStatus], guard: Guard) -> None:
        self.address_family = family
        self.status = status
        self.guard = guard
        # Each open connection, oldest first, with the time at which it is ended.
        self._open: dict[Any, float] = {}
        self._changed = threading.Condition()
        super().__init__(address, Handler)

    def serve(self) -> None:
        """Answer requests until ``shutdown()``."""
        self.serve_forever(_POLL_SECONDS)

    def server_bind(self) -> None:
        """Bind, without the look-up of this machine's name by HTTPServer, which can take many seconds."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a new connection, if there is room, or room can be made."""
        with self._changed:
            if len(self._open) >= MOST_CONNECTIONS:
                _end(next(iter(self._open)))
                room = self._changed.wait_for(lambda: len(self._open) < MOST_CONNECTIONS, _POLL_SECONDS)
                if not room:
                    super().shutdown_request(request)
                    return
            self._open[request] = time.monotonic() + CONNECTION_SECONDS
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and make its place free."""
        with self._changed:
            super().shutdown_request(request)
            self._open.pop(request, None)
            self._changed.notify_all()

    def service_actions(self) -> None:
        """End the connections whose time is up."""
        now = time.monotonic()
        with self._changed:
            for request, until in self._open.items():
                if now >= until:
                    _end(request)

    def server_close(self) -> None:
        """Free the port, and wait a moment for the threads of connections to end."""
        super().server_close()
        with self._changed:
            for request in self._open:
                _end(request)
            self._changed.wait_for(lambda: not self._open, _CLOSING_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ends early is its client's affair, and no reason to fill the log."""
        if isinstance(sys.exc_info()[1], OSError):
            log.debug("a connection to the status service ended early", exc_info=True)
        else:
            log.exception("a connection to the status service failed")


def _end(request: socket.socket) -> None:
    """Wake the connection's thread, which then closes it."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("a connection was over already")
