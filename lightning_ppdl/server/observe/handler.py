"""What is answered to which request, and the headers around it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from lightning_ppdl.server.observe import metrics
from lightning_ppdl.server.observe.page import STYLE_HASH, render
from lightning_ppdl.server.observe.status import ServiceStatus, as_json

if TYPE_CHECKING:
    from lightning_ppdl.server.observe.listener import Listener

log = logging.getLogger(__name__)

CONNECTION_SECONDS = 10.0
"""How long one connection may last."""

_REQUEST_BYTES = 65536
_TEXT = "text/plain; charset=utf-8"

# Nothing is loaded but the page itself, whose one style element and inline icon are let in; no other page
# may frame or read it, and no cache keeps it.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src '{STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Handler(BaseHTTPRequestHandler):
    """One request and its answer; then the connection is closed."""

    timeout = CONNECTION_SECONDS
    server: Listener

    def setup(self) -> None:
        """Prepare to read the request, up to its bound."""
        super().setup()
        self.rfile = _Head(self.rfile)

    def do_GET(self) -> None:
        """Answer what is shown at this path, to those who may see it."""
        path = self.path.partition("?")[0]
        if not self.server.guard.addresses_us(self.headers):
            self._say(
                HTTPStatus.FORBIDDEN,
                "This service is addressed as localhost, 127.0.0.1 or [::1] only.",
            )
        elif path == "/health":
            self._answer(HTTPStatus.OK, _TEXT, b"ok")
        elif not self.server.guard.knows_password(self.headers):
            self._say(
                HTTPStatus.UNAUTHORIZED,
                "The password is needed; any user name goes with it.",
                {"WWW-Authenticate": 'Basic realm="ppdl status", charset="UTF-8"'},
            )
        elif path in _ROUTES:
            kind, show = _ROUTES[path]
            try:
                content = show(self.server.status())
            except Exception:
                log.exception("the status could not be shown")
                self._say(HTTPStatus.INTERNAL_SERVER_ERROR, "No status; the server's log says why.")
                return
            self._answer(HTTPStatus.OK, kind, content)
        else:
            self._say(HTTPStatus.NOT_FOUND, f"There are {', '.join(_ROUTES)} and /health, and nothing else.")

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is none, or has a method that is not served; without repeating it."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._say(
                HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are answered.", {"Allow": "GET, HEAD"}
            )
        else:
            self._say(HTTPStatus(code), HTTPStatus(code).phrase)

    def version_string(self) -> str:
        """Named in each answer; not the version of Python."""
        return "ppdl"

    def log_message(self, format: str, *args: object) -> None:
        """A request every few seconds is nothing to tell."""
        log.debug(format, *args)

    def _say(self, code: HTTPStatus, text: str, extra: dict[str, str] | None = None) -> None:
        self._answer(code, _TEXT, f"{text}\n".encode(), extra)

    def _answer(
        self, code: HTTPStatus, kind: str, content: bytes, extra: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS, **(extra or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Head(io.BufferedIOBase):
    """The lines of a request, not more than a bound.

    Beyond it an error is raised. Had the lines just ended, a web page could choose where its visitor's
    browser's ``Host: localhost.example`` is cut.
    """

    def __init__(self, lines: io.BufferedIOBase) -> None:
        self._lines = lines
        self._left = _REQUEST_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = self._lines.readline(self._left + 1 if size is None or size < 0 else size)
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionAbortedError(f"a request of more than {_REQUEST_BYTES} bytes")
        return line

    def close(self) -> None:
        self._lines.close()


def _json(status: ServiceStatus) -> bytes:
    return json.dumps(as_json(status), indent=2, allow_nan=False).encode() + b"\n"


_ROUTES: dict[str, tuple[str, Callable[[ServiceStatus], bytes]]] = {
    "/": ("text/html; charset=utf-8", render),
    "/metrics": (metrics.CONTENT_TYPE, metrics.exposition),
    "/status.json": ("application/json", _json),
}
