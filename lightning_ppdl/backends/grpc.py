"""``grpc://HOST:PORT`` and ``grpcs://HOST:PORT``: a parameter server on another machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_ppdl.backends.base import Backend, split_url
from lightning_ppdl.backends.channel import Channel, NoAnswer
from lightning_ppdl.backends.credentials import Credentials, from_query
from lightning_ppdl.errors import (
    ConfigurationError,
    JoinRefusedError,
    PPDLError,
    ServerClosedError,
    TurnTimeoutError,
)
from lightning_ppdl.records import (
    DownloadRequest,
    Manifest,
    Membership,
    Receipt,
    ServerStatus,
    Vector,
)
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.wire import update_header

__all__ = ["Credentials", "GrpcBackend"]

T = TypeVar("T")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 10.0
_SHORT_SECONDS = 15.0
"""For a request that carries little."""
_SECONDS_PER_MEGABYTE = 1.0
"""And for each megabyte: a link slower than this is as good as down."""
_ONE_TURN_REQUEST_SECONDS = 20.0
_MOST_REQUEST_BYTES = 2 * messages.PART_BYTES


class GrpcBackend(Backend):
    """A connection to ``ppdl serve``, or to any :class:`~lightning_ppdl.server.service.GrpcService`.

    What does not get through is tried again, with pauses that double and vary, for up to
    :attr:`~lightning_ppdl.Backend.patience_seconds`. An upload is sent again as the same bytes, which the
    server merges once.

    Args:
        url: ``grpc://HOST:PORT``, or ``grpcs://HOST:PORT`` with TLS. Credentials may stand behind it, as
            ``?ca=PATH&certificate=PATH&key=PATH&token_file=PATH``.
        credentials: In place of those.

    Raises:
        ConfigurationError: for a URL that cannot be one.
    """

    def __init__(self, url: str, credentials: Credentials | None = None) -> None:
        parts = split_url(url)
        if (
            parts.scheme not in ("grpc", "grpcs")
            or not parts.hostname
            or _port(url) is None
            or parts.path
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise ConfigurationError(
                f"server={url!r} must have the form 'grpc://HOST:PORT', or 'grpcs://HOST:PORT' with TLS"
            )
        super().__init__(f"{parts.scheme}://{parts.netloc}")
        credentials = from_query(url, parts.query) if credentials is None else credentials
        encrypted = parts.scheme == "grpcs"
        credentials.require_fitting(self.url, encrypted)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._channel = Channel(self.url, parts.netloc, encrypted, local, credentials)
        self._session = ""
        self._size = 0
        self._participant = ""

    def join(self, participant: str, manifest: Manifest) -> Membership:
        request = pb.JoinRequest(participant=participant, manifest=messages.manifest_message(manifest))
        if request.ByteSize() > _MOST_REQUEST_BYTES:
            raise JoinRefusedError(
                f"the names and shapes of {len(manifest.parameters)} parameters take {request.ByteSize()} "
                f"bytes, more than the {_MOST_REQUEST_BYTES} that fit into a request; share fewer of them"
            )
        membership = self._believe(
            messages.membership_record, self._ask("Join", request, pb.JoinReply, _SHORT_SECONDS)
        )
        self._session, self._participant, self._size = membership.session, participant, manifest.size
        return membership

    def offer_initial(self, vector: Vector) -> bool:
        if vector.shape != (self._size,):  # the server sees bytes only
            raise JoinRefusedError(
                f"initial parameters must be finite float32 of shape {(self._size,)}, not {vector.shape}"
            )
        raw = vector.astype("<f4").tobytes()
        reply = self._ask(
            "OfferInitial", lambda: messages.parts(raw, self._joined), pb.OfferReply, _seconds(len(raw))
        )
        return bool(reply.taken)

    def take_turn(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while True:
            wait = max(0.0, min(deadline - time.monotonic(), _ONE_TURN_REQUEST_SECONDS))
            request = pb.TakeTurnRequest(session=self._joined, wait_seconds=wait)
            reply = self._ask("TakeTurn", request, pb.TakeTurnReply, wait + _SHORT_SECONDS)
            if reply.taken:
                return
            if time.monotonic() >= deadline:
                awaited = ", ".join(map(repr, reply.awaited)) or "others to join"
                raise TurnTimeoutError(
                    f"participant {self._participant!r} waited {timeout_seconds:g} seconds for its turn at "
                    f"{self.url!r}, which is waiting for {awaited}"
                )

    def renew_turn(self) -> None:
        # Between two steps of training: what does not get through now will at the next batch.
        self._ask("RenewTurn", self._session_request, pb.EmptyReply, _SHORT_SECONDS, patience_seconds=0.0)

    def end_turn(self) -> None:
        self._ask("EndTurn", self._session_request, pb.EmptyReply, _SHORT_SECONDS)

    def download(self, request: DownloadRequest) -> bytes | bytearray:
        asked = messages.download_message(self._joined, request)
        return self._receive("Download", asked, self._size, _seconds(4 * self._size))[1]

    def upload(self, message: bytes) -> Receipt:
        seconds = _seconds(len(message))
        if len(message) <= messages.PART_BYTES:
            request = pb.UploadRequest(session=self._joined, update=message)
            reply = self._ask("Upload", request, pb.ReceiptReply, seconds)
        else:
            reply = self._ask(
                "UploadParts", lambda: messages.parts(message, self._joined), pb.ReceiptReply, seconds
            )
        receipt = self._believe(messages.receipt_record, reply)
        if receipt.round != update_header(message).round:
            self._channel.disbelieve(f"round {update_header(message).round} was answered with {receipt}")
        return receipt

    def leave(self) -> None:
        if self._session:
            try:
                self._ask("Leave", self._session_request, pb.EmptyReply, 5.0, patience_seconds=0.0)
            except PPDLError:
                pass  # the server finds out by itself, when the lease ends
            finally:
                self._session = ""
                self.close()

    def close(self) -> None:
        """Close the connection without leaving; the next request opens another."""
        self._channel.close()

    def status(self) -> ServerStatus:
        return messages.status_record(self._ask("Status", pb.StatusRequest(), pb.StatusReply, _SHORT_SECONDS))

    def export(self) -> tuple[Manifest, bytes | bytearray]:
        manifest, message = self._receive("Export", pb.ExportRequest(), None, 3600.0)
        if manifest is None:
            self._channel.disbelieve("parameters without their manifest")
        return manifest, message

    @property
    def _joined(self) -> str:
        if not self._session:
            raise ServerClosedError(f"not connected to {self.url!r}: join() first")
        return self._session

    @property
    def _session_request(self) -> pb.SessionRequest:
        return pb.SessionRequest(session=self._joined)

    def _ask(
        self,
        method: str,
        request: Any,
        reply: Any,
        seconds: float,
        patience_seconds: float | None = None,
    ) -> Any:
        return self._persistently(
            lambda: self._channel.ask(method, request, reply, seconds), patience_seconds
        )

    def _receive(
        self, method: str, request: Any, size: int | None, seconds: float
    ) -> tuple[Manifest | None, bytearray]:
        return self._persistently(lambda: self._channel.receive(method, request, size, seconds), None)

    def _persistently(self, attempt: Callable[[], T], patience_seconds: float | None) -> T:
        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        deadline = time.monotonic() + patience
        pause, told = _FIRST_PAUSE_SECONDS, False
        while True:
            try:
                answer = attempt()
            except NoAnswer as problem:
                error = failures.error_of(problem.code, problem.name, problem.said, self.url)
                remaining = deadline - time.monotonic()
                passing = failures.may_pass(problem.code, problem.name, problem.said)
                if not passing or remaining <= 0:
                    if told and not passing:
                        self.tell(f"{self.url} answers again")
                    # Its own words alone: what is below is gRPC's, and would be shown above them.
                    raise error from None
                if not told:
                    self.tell(f"{error}; trying again for up to {patience:.0f} seconds")
                    told = True
                # They must not all come back in the same instant when a server does.
                time.sleep(min(remaining, pause * random.uniform(0.5, 1.5)))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if told:
                self.tell(f"{self.url} answers again")
            return answer

    def _believe(self, read: Callable[[Any], T], reply: Any) -> T:
        try:
            return read(reply)
        except ValueError as error:
            self._channel.disbelieve(str(error))


def _seconds(size_bytes: int) -> float:
    return 60.0 + _SECONDS_PER_MEGABYTE * size_bytes / 1e6


def _port(url: str) -> int | None:
    try:
        return split_url(url).port
    except ValueError:
        return None
