"""A gRPC connection to a parameter server: what is sent once, and what came back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning_ppdl.backends.credentials import Credentials
from lightning_ppdl.errors import ConfigurationError, JoinRefusedError, ServerFailedError
from lightning_ppdl.records import Manifest
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.wire import max_message_bytes

try:
    import grpc
except ImportError as error:
    raise ConfigurationError(
        "grpc:// addresses need further packages: pip install 'lightning_ppdl[network]'"
    ) from error

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
_MOST_EXPORTED = 4_000_000_000
"""Entries that an export may have: 16 gigabytes."""


class NoAnswer(Exception):
    """A request was answered with an error, or not at all.

    Args:
        code: Name of gRPC's status code.
        name: Of the error class, None where the server did not answer by itself.
        said: The status's details.
    """

    def __init__(self, code: str, name: str | None, said: str) -> None:
        super().__init__(code, name, said)
        self.code = code
        self.name = name
        self.said = said


class Channel:
    """Sends each request once. Opened by the first one, and by the next after :meth:`close`.

    Args:
        url: For messages: ``grpc://HOST:PORT``, or ``grpcs://HOST:PORT``.
        place: ``HOST:PORT``.
        encrypted: Whether to speak TLS.
        local: Whether it leads to this very machine.
        credentials: That fit the connection. Their files are read when it is opened.

    Raises:
        ConfigurationError: from the first request, for files that cannot be read or used.
    """

    def __init__(self, url: str, place: str, encrypted: bool, local: bool, credentials: Credentials) -> None:
        self._url = url
        # In full: a host may have a name that gRPC takes for the scheme of an address, "unix" for one.
        self._address = f"dns:///{place}"
        self._encrypted = encrypted
        self._local = local
        self._credentials = credentials
        self._channel: Any = None
        self._metadata: tuple[tuple[str, str], ...] = ()

    def ask(self, method: str, request: Any, reply: Any, seconds: float) -> Any:
        """Send one request, or a stream of parts (as a function that makes it), and wait for the reply.

        Args:
            method: Its name in the schema.
            request: A message, or the function.
            reply: The class of the answer.
            seconds: How long to wait.

        Raises:
            NoAnswer: if none came in time, or an error.
            ServerFailedError: for an answer that is none of the schema's.
        """
        path = f"/{messages.SERVICE}/{method}"
        with _failures():
            if callable(request):
                call = self._open().stream_unary(path, pb.Part.SerializeToString, messages.parser(reply))
                answer = call(request(), timeout=seconds, metadata=self._metadata)
            else:
                call = self._open().unary_unary(path, type(request).SerializeToString, messages.parser(reply))
                answer = call(request, timeout=seconds, metadata=self._metadata)
        if answer is messages.UNREADABLE:
            self.disbelieve(f"no {reply.DESCRIPTOR.name}")
        return answer

    def receive(
        self, method: str, request: Any, size: int | None, seconds: float
    ) -> tuple[Manifest | None, bytearray]:
        """Receive a message in parts.

        Args:
            method, request, seconds: As in :meth:`ask`.
            size: The most entries it may have; None for as many as its manifest says.

        Raises:
            NoAnswer: if it did not all come in time, or an error.
            ServerFailedError: for what no server sends.
        """
        with _failures():
            call = self._open().unary_stream(
                f"/{messages.SERVICE}/{method}", type(request).SerializeToString, messages.parser(pb.Part)
            )
            parts: Any = call(request, timeout=seconds, metadata=self._metadata)
            try:
                return _assembled(parts, size)
            except (EOFError, OverflowError, ValueError, JoinRefusedError) as error:
                return self.disbelieve(str(error))
            finally:
                parts.cancel()  # does nothing at the end

    def disbelieve(self, what: str) -> NoReturn:
        """Raise ServerFailedError: the server sent ``what``."""
        raise ServerFailedError(f"{self._url!r} sent what no parameter server sends: {what}") from None

    def close(self) -> None:
        """Once more does nothing."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _open(self) -> Any:
        if self._channel is None:
            token = self._credentials.token()
            if token is not None:
                if not (self._encrypted or self._local or self._credentials.allow_plaintext_token):
                    raise ConfigurationError(
                        f"token_file with server={self._url!r} would send the token in the clear; use "
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


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        name = next(
            (value for key, value in error.trailing_metadata() or () if key == failures.METADATA_KEY), None
        )
        raise NoAnswer(error.code().name, name, error.details() or "") from None


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
