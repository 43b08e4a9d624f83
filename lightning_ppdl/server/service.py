"""The parameter server over gRPC: one thread with an event loop, in front of the core of all backends."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from lightning_ppdl.errors import ConfigurationError, PPDLError, ServerFailedError, StateError
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.server.answers import Answers, Handle, Method
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.reading import Sent
from lightning_ppdl.server.security import Gate, Limits, Security, is_loopback, read_file, split_address
from lightning_ppdl.server.transfers import Caller, Transfers

try:
    import grpc
    from grpc_health.v1 import health_pb2
    from grpc_reflection.v1alpha import reflection_pb2

    from lightning_ppdl.server.public import HEALTH, REFLECTION, PublicAnswers
except ImportError as error:
    raise ConfigurationError(
        "serving over gRPC needs further packages: pip install 'lightning_ppdl[network]'"
    ) from error

log = logging.getLogger(__name__)

_MOST_DETAILS_BYTES = 1500
"""Of a refusal's words. They travel in the metadata, percent-encoded: three times as long at worst."""
_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * messages.PART_BYTES),
    ("grpc.max_concurrent_streams", 100),
    ("grpc.max_metadata_size", 16 * 1024),
    # Who has gone without a word is noticed, and its requests end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_connection_idle_ms", 10 * 60_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # None: what travels is compressed already, and nobody can send what becomes larger here.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.so_reuseport", 0),
)


class GrpcService:
    """Serves a :class:`~lightning_ppdl.ParameterServer` at an address.

    Args:
        server: What to serve; it is opened at the start, and closed by whoever made it.
        address: ``"HOST:PORT"``; port 0 takes a free one.
        security: TLS, and who may speak.
        limits: What clients may use.

    Raises:
        ConfigurationError: for an address or a combination that cannot be served.
    """

    def __init__(
        self,
        server: ParameterServer,
        address: str = "127.0.0.1:50051",
        security: Security | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._server = server
        self._security = Security() if security is None else security
        self._host, self._port = split_address("address", address)
        self._security.require_safe(self._host)
        self._limits = Limits() if limits is None else limits
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._started = threading.Event()
        self.failed: Callable[[], None] = lambda: None
        """Called if it cannot go on, after that is in the log."""
        self._problem: BaseException | None = None

    @property
    def url(self) -> str:
        """Where participants find it, from this machine: ``grpc://...`` or ``grpcs://...``."""
        host = "127.0.0.1" if self._host in ("0.0.0.0", "[::]") else self._host
        return f"grpc{'s' if self._security.encrypted else ''}://{host}:{self._port}"

    def start(self) -> None:
        """Begin to serve.

        Raises:
            ConfigurationError: if the address cannot be had.
            StateError: if the server's state directory cannot be used.
        """
        self._server.open()
        self._gate = Gate(self._security)
        if self._security.open and not is_loopback(self._host):
            log.warning(
                "%s is open to everybody who reaches it, under any name: give client_ca or tokens", self.url
            )
        self._thread = threading.Thread(target=self._run, name="ppdl-grpc", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._problem is not None:
            self._thread.join()
            raise self._problem

    def stop(self) -> None:
        """Answer what is under way, for a second at most, and serve no more; once more does nothing."""
        if self._loop is not None and self._ended is not None and self._thread is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._problem = error
            if self._started.is_set():
                log.exception("the gRPC service at %s failed", self.url)
                self.failed()
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._transfers = Transfers(self._limits)
        self._answers = Answers(self._server, self._limits, self._transfers)
        listener = grpc.aio.server(options=_OPTIONS)
        self._public = PublicAnswers((messages.SERVICE, HEALTH, REFLECTION))
        listener.add_generic_rpc_handlers(self._handlers())
        self._port = self._listen(listener)
        await listener.start()
        self._started.set()
        await self._ended.wait()
        self._public.serving = False
        await listener.stop(grace=1.0)

    def _listen(self, listener: Any) -> int:
        address = f"{self._host}:{self._port}"
        try:
            if not self._security.encrypted:
                port = listener.add_insecure_port(address)
            else:
                assert self._security.certificate is not None and self._security.key is not None
                pair = (
                    read_file("key", self._security.key),
                    read_file("certificate", self._security.certificate),
                )
                authority = self._security.client_ca
                roots = None if authority is None else read_file("client_ca", authority)
                port = listener.add_secure_port(
                    address, grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)
                )
        except RuntimeError as error:
            raise ConfigurationError(
                f"address={address!r} cannot be served: {error}. Another program may listen there, the name "
                f"may not be this machine's, or the certificate and the key may not belong together"
            ) from error
        return int(port)

    def _handlers(self) -> tuple[Any, ...]:
        asked, told = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        check = Method(self._public.check, asked, told)
        asked, told = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        reflect = Method(self._public.reflect, asked, told, streams=True)
        return tuple(
            grpc.method_handlers_generic_handler(
                service,
                {
                    name: _handler(self._answering(method.handle, public), method)
                    for name, method in methods.items()
                },
            )
            for service, methods, public in (
                (messages.SERVICE, self._answers.methods(), False),
                (HEALTH, {"Check": check}, True),
                (REFLECTION, {"ServerReflectionInfo": reflect}, True),
            )
        )

    def _answering(self, handle: Handle, public: bool) -> Callable[[Sent, Any], Awaitable[Any]]:
        """``handle``, once it is known who asks. Its errors become status codes; no traceback ever reaches a
        client."""

        async def handler(sent: Sent, context: Any) -> Any:
            caller = Caller(context, self._limits.silence_seconds)
            try:
                if public:
                    return await handle(sent, caller)
                with self._answers.counted():
                    if not self._security.open:
                        metadata = context.invocation_metadata() or ()
                        caller.names = self._gate.names(context.auth_context(), metadata)
                    self._transfers.admit(caller)
                try:
                    return await handle(sent, caller)
                finally:
                    self._transfers.dismiss(caller)
            except PPDLError as error:
                await _abort(context, error)
            except asyncio.CancelledError:
                problem = caller.interrupted()
                if problem is None:
                    raise
                log.warning("a request from %s was ended: %s", caller.address, problem)
                await _abort(context, problem)
            except grpc.aio.InternalError as error:
                log.debug("%s went away in the middle of a request: %s", caller.address, error)
            except Exception:
                log.exception("a request failed")
                await _abort(
                    context, ServerFailedError("the server failed at this request; its log says why")
                )

        return handler


def _handler(handle: Callable[[Sent, Any], Awaitable[Any]], method: Method) -> Any:
    # As if the client sent a stream, whatever it sends: of a single message, too, gRPC would else read the
    # whole before anything here could tell who sends it, and wait for it for ever.
    kind = grpc.stream_stream_rpc_method_handler if method.streams else grpc.stream_unary_rpc_method_handler
    return kind(handle, messages.parser(method.request), method.reply.SerializeToString)


async def _abort(context: Any, error: PPDLError) -> None:
    said = str(error)
    if isinstance(error, StateError):
        # Where the server keeps its files is nobody else's business.
        log.error("a request could not be made durable: %s", error)
        said = "the server could not make this durable, and nothing was changed; its log says why"
    details = said.encode(errors="replace")
    if len(details) > _MOST_DETAILS_BYTES:
        said = details[:_MOST_DETAILS_BYTES].decode(errors="ignore") + "..."
    code = getattr(grpc.StatusCode, failures.code_of(error))
    await context.abort(code, said, ((failures.METADATA_KEY, type(error).__name__),))
