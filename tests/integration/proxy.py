"""A TCP connection that fails on demand: stands between a client and a server on this machine."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType


class Proxy:
    """Passes bytes on between whoever connects to :attr:`port` and ``target``, until told otherwise.

    All switches may be changed at any time and take effect at once, for open connections too.

    Args:
        target: Port on 127.0.0.1.

    Usage::

        with Proxy(service_port) as proxy:
            backend = connect(proxy.url)
            proxy.drop_replies = True  # what is sent arrives, but no answer comes back
            ...
            proxy.cut()                # all connections break
            proxy.drop_replies = False
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.drop_replies = False
        """Requests pass, what the server sends is swallowed."""
        self.black_hole = False
        """Nothing passes in either direction, and nobody is told: a dead link, or a half-open connection."""
        self.refuse = False
        """New connections are closed at once: a server that is down."""
        self.delay_seconds = 0.0
        """Added to whatever passes, either way."""
        self.request_bytes, self.reply_bytes = 0, 0
        """That have passed."""
        self.connections = 0
        """Ever accepted."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break every connection, with a reset, as a machine does that has crashed."""
        with self._guard:
            victims = list(self._open)
            self._open.clear()
        for each in victims:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            # Wakes the thread that reads from it; close() alone would not.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                each.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            self.connections += 1
            if self.refuse:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._guard:
                self._open |= {client, server}
            threading.Thread(target=self._pass_on, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, requests: bool) -> None:
        try:
            while data := source.recv(2**16):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                if self.black_hole or (self.drop_replies and not requests):
                    continue
                sink.sendall(data)
                if requests:
                    self.request_bytes += len(data)
                else:
                    self.reply_bytes += len(data)
        except OSError:
            pass  # cut, by either side
        finally:
            for each in (source, sink):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                with suppress(OSError):
                    each.close()
                with self._guard:
                    self._open.discard(each)
