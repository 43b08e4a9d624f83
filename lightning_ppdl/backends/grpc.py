"""``grpc://HOST:PORT`` and ``grpcs://HOST:PORT``: a parameter server on another machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from lightning_ppdl.backends.base import Backend, split_url
from lightning_ppdl.errors import (
    ConfigurationError,
    JoinRefusedError,
    PPDLError,
    ServerClosedError,
    ServerFailedError,
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
from lightning_ppdl.wire import max_message_bytes, update_header

try:
    import grpc
except ImportError as error:
    raise ConfigurationError(
        "grpc:// addresses need further packages: pip install 'lightning_ppdl[network]'"
    ) from error

T = TypeVar("T")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 10.0
_SHORT_SECONDS = 15.0
"""For a request that carries little."""
_SECONDS_PER_MEGABYTE = 1.0
"""And for each megabyte: a link slower than this is as good as down."""
_ONE_TURN_REQUEST_SECONDS = 20.0
_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * messages.PART_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # What travels is compressed already; a server must not send what becomes larger here.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)
_MOST_REQUEST_BYTES = 2 * messages.PART_BYTES
_MOST_EXPORTED = 4_000_000_000
"""Entries that an export may have: 16 gigabytes."""


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
        self._credentials = _from_query(url, parts.query) if credentials is None else credentials
        self._encrypted = parts.scheme == "grpcs"
        self._credentials.require_fitting(self.url, self._encrypted)
        self._local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        # In full: a host may have a name that gRPC takes for the scheme of an address, "unix" for one.
        self._address = f"dns:///{parts.netloc}"
        self._channel: Any = None
        self._metadata: tuple[tuple[str, str], ...] = ()
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
            self._disbelieve(f"round {update_header(message).round} was answered with {receipt}")
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
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def status(self) -> ServerStatus:
        return messages.status_record(self._ask("Status", pb.StatusRequest(), pb.StatusReply, _SHORT_SECONDS))

    def export(self) -> tuple[Manifest, bytes | bytearray]:
        manifest, message = self._receive("Export", pb.ExportRequest(), None, 3600.0)
        if manifest is None:
            self._disbelieve("parameters without their manifest")
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
        """Send one request, or a stream of parts (as a function that makes it), and wait for the reply."""
        path = f"/{messages.SERVICE}/{method}"

        def attempt() -> Any:
            if callable(request):
                call = self._open().stream_unary(path, pb.Part.SerializeToString, messages.parser(reply))
                answer = call(request(), timeout=seconds, metadata=self._metadata)
            else:
                call = self._open().unary_unary(path, type(request).SerializeToString, messages.parser(reply))
                answer = call(request, timeout=seconds, metadata=self._metadata)
            if answer is messages.UNREADABLE:
                self._disbelieve(f"no {reply.DESCRIPTOR.name}")
            return answer

        return self._persistently(attempt, patience_seconds)

    def _receive(
        self, method: str, request: Any, size: int | None, seconds: float
    ) -> tuple[Manifest | None, bytearray]:
        """Receive a message in parts; ``size`` entries at most, None for as many as its manifest says."""

        def attempt() -> tuple[Manifest | None, bytearray]:
            call = self._open().unary_stream(
                f"/{messages.SERVICE}/{method}", type(request).SerializeToString, messages.parser(pb.Part)
            )
            parts: Any = call(request, timeout=seconds, metadata=self._metadata)
            try:
                return _assembled(parts, size)
            except (EOFError, OverflowError, ValueError, JoinRefusedError) as error:
                return self._disbelieve(str(error))
            finally:
                parts.cancel()  # does nothing at the end

        return self._persistently(attempt, None)

    def _persistently(self, attempt: Callable[[], T], patience_seconds: float | None) -> T:
        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        deadline = time.monotonic() + patience
        pause, told = _FIRST_PAUSE_SECONDS, False
        while True:
            try:
                answer = attempt()
            except grpc.RpcError as raised:
                code, name, said = raised.code().name, _error_name(raised), raised.details() or ""
                error = failures.error_of(code, name, said, self.url)
                remaining = deadline - time.monotonic()
                passing = failures.may_pass(code, name, said)
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
            self._disbelieve(str(error))

    def _disbelieve(self, what: str) -> NoReturn:
        raise ServerFailedError(f"{self.url!r} sent what no parameter server sends: {what}") from None

    def _open(self) -> Any:
        if self._channel is None:
            token = self._credentials.token()
            if token is not None:
                if not (self._encrypted or self._local or self._credentials.allow_plaintext_token):
                    raise ConfigurationError(
                        f"token_file with server={self.url!r} would send the token in the clear; use "
                        f"grpcs://, or, where something else encrypts the way, allow_plaintext_token=true"
                    )
                self._metadata = (("authorization", f"Bearer {token}"),)
            if not self._encrypted:
                self._channel = grpc.insecure_channel(self._address, _OPTIONS)
            else:
                read = self._credentials.read
                files = grpc.ssl_channel_credentials(read("ca"), read("key"), read("certificate"))
                self._channel = grpc.secure_channel(self._address, files, _OPTIONS)
        return self._channel


def _assembled(parts: Iterator[Any], size: int | None) -> tuple[Manifest | None, bytearray]:
    """The message in ``parts``, of ``size`` entries at most; None for as many as its manifest says.

    Raises:
        EOFError, OverflowError, ValueError, JoinRefusedError: for what no server sends.
    """
    manifest, assembly = None, None
    for part in parts:
        if part is messages.UNREADABLE:
            raise ValueError("no Part")
        if assembly is None:
            if part.HasField("manifest") == (size is not None):
                raise ValueError("a manifest where none belongs" if size is not None else "no manifest")
            if size is None:
                manifest = messages.manifest_record(part.manifest)
            entries = size if manifest is None else min(manifest.size, _MOST_EXPORTED)
            assembly = messages.Assembly(max_message_bytes(entries or 0))
        assembly.add(part)
    if assembly is None:
        raise EOFError("nothing at all")
    return manifest, assembly.take()


def _error_name(error: Any) -> str | None:
    return next(
        (value for key, value in error.trailing_metadata() or () if key == failures.METADATA_KEY), None
    )


def _seconds(size_bytes: int) -> float:
    return 60.0 + _SECONDS_PER_MEGABYTE * size_bytes / 1e6


def _port(url: str) -> int | None:
    try:
        return split_url(url).port
    except ValueError:
        return None


def _from_query(url: str, query: str) -> Credentials:
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
