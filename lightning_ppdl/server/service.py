"""The parameter server over gRPC: one thread with an event loop, in front of the core of all backends."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from lightning_ppdl.errors import (
    AdmissionError,
    ConfigurationError,
    JoinRefusedError,
    LimitExceededError,
    MalformedUpdateError,
    PPDLError,
    ServerFailedError,
)
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.security import Gate, Limits, Security, is_loopback, read_file, split_address
from lightning_ppdl.server.transfers import Transfers
from lightning_ppdl.wire import max_update_bytes

try:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection
except ImportError as error:
    raise ConfigurationError(
        "serving over gRPC needs further packages: pip install 'lightning_ppdl[network]'"
    ) from error

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_WAIT_SECONDS = 20.0
"""For a turn, in one request: who waits longer asks again, which is a sign of life."""
_LARGE_BYTES = 4 * 2**20
"""From which size on a message is worked on in a thread, and others are answered meanwhile."""
_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * messages.PART_BYTES),
    ("grpc.max_concurrent_streams", 100),
    ("grpc.max_metadata_size", 16 * 1024),
    # Who has gone without a word is noticed, and its requests end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30 * 60_000),
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
        self._changed: asyncio.Event | None = None
        self._started = threading.Event()
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
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._changed = asyncio.Event()
        self._transfers = Transfers(self._limits)
        self._server.watch(self._wake)
        listener = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=self._limits.max_requests)
        listener.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(messages.SERVICE, self._handlers()),)
        )
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, listener)
        names = (messages.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, listener)
        self._port = self._listen(listener)
        await listener.start()
        for name in ("", messages.SERVICE):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._started.set()
        await self._ended.wait()
        await checks.enter_graceful_shutdown()
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

    def _handlers(self) -> dict[str, Any]:
        simple: dict[str, tuple[Callable[..., Any], Any, Any]] = {
            "Join": (self._join, pb.JoinRequest, pb.JoinReply),
            "TakeTurn": (self._take_turn, pb.TakeTurnRequest, pb.TakeTurnReply),
            "RenewTurn": (self._renew_turn, pb.SessionRequest, pb.EmptyReply),
            "EndTurn": (self._end_turn, pb.SessionRequest, pb.EmptyReply),
            "Upload": (self._upload, pb.UploadRequest, pb.ReceiptReply),
            "Leave": (self._leave, pb.SessionRequest, pb.EmptyReply),
            "Status": (self._status, pb.StatusRequest, pb.StatusReply),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(handle), messages.parser(request), reply.SerializeToString
            )
            for name, (handle, request, reply) in simple.items()
        }
        for name, handle, reply in (
            ("OfferInitial", self._offer_initial, pb.OfferReply),
            ("UploadParts", self._upload_parts, pb.ReceiptReply),
        ):
            handlers[name] = grpc.stream_unary_rpc_method_handler(
                self._answering(handle), messages.parser(pb.Part), reply.SerializeToString
            )
        for name, sends, request in (
            ("Download", self._download, pb.DownloadRequest),
            ("Export", self._export, pb.ExportRequest),
        ):
            handlers[name] = grpc.unary_stream_rpc_method_handler(
                self._answering(sends), messages.parser(request), pb.Part.SerializeToString
            )
        return handlers

    def _answering(
        self, handle: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """``handle``, whose errors become status codes; no traceback ever reaches a client."""

        async def handler(request: Any, context: Any) -> Any:
            try:
                return await handle(request, context)
            except PPDLError as error:
                await _abort(context, error)
            except Exception:
                log.exception("a request failed")
                await _abort(
                    context, ServerFailedError("the server failed at this request; its log says why")
                )

        return handler

    # What is asked for, one method each

    async def _join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        self._require_readable(request)
        with self._counted():
            self._require(request.participant, context)
            manifest = messages.manifest_record(request.manifest)
            if manifest.size > self._limits.max_parameters:
                raise JoinRefusedError(
                    f"{manifest.size} shared entries are more than the {self._limits.max_parameters} that "
                    f"this server takes; its operator can raise max_parameters"
                )
        join = partial(self._server.join, request.participant, manifest, self.url)
        membership = await self._in_thread(join)
        log.info("participant %r joined, after round %d", request.participant, membership.last_round)
        return messages.membership_message(membership)

    async def _offer_initial(self, sent: AsyncIterator[pb.Part], context: Any) -> pb.OfferReply:
        first = await self._first_part(sent)
        name = self._require_session(first.session, context)
        async with self._transfers.of(name, "up", large=True):
            raw = await self._whole(first, sent, 4 * self._server.status().parameters)
            offer = partial(self._server.offer_initial, first.session, messages.vector_record(raw))
            return pb.OfferReply(taken=await self._in_thread(offer))

    async def _take_turn(self, request: pb.TakeTurnRequest, context: Any) -> pb.TakeTurnReply:
        self._require_readable(request)
        self._require_session(request.session, context)
        assert self._loop is not None and self._changed is not None
        until = self._loop.time() + min(max(0.0, request.wait_seconds), _LONGEST_WAIT_SECONDS)
        while True:
            changed = self._changed
            if self._server.take_turn(request.session):
                return pb.TakeTurnReply(taken=True)
            remaining = until - self._loop.time()
            if not remaining > 0:
                return pb.TakeTurnReply(taken=False, awaited=self._server.status().awaited)
            # Woken by every change of turn, but not by leases that run out silently. The server's clock
            # need not be this one: look again after a second in any case.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    changed.wait(), min(remaining, 1.0, max(0.01, self._server.seconds_to_expiry()))
                )

    async def _renew_turn(self, request: pb.SessionRequest, context: Any) -> pb.EmptyReply:
        self._require_readable(request)
        self._require_session(request.session, context)
        self._server.renew_turn(request.session)
        return pb.EmptyReply()

    async def _end_turn(self, request: pb.SessionRequest, context: Any) -> pb.EmptyReply:
        self._require_readable(request)
        self._require_session(request.session, context)
        self._server.end_turn(request.session)
        return pb.EmptyReply()

    async def _leave(self, request: pb.SessionRequest, context: Any) -> pb.EmptyReply:
        self._require_readable(request)
        name = self._require_session(request.session, context)
        await self._in_thread(partial(self._server.leave, request.session))
        log.info("participant %r left", name)
        return pb.EmptyReply()

    async def _download(self, request: pb.DownloadRequest, context: Any) -> None:
        self._require_readable(request)
        name = self._require_session(request.session, context)
        large = 4 * self._server.size > messages.PART_BYTES
        async with self._transfers.of(name, "down", large):
            ask = partial(self._server.download, request.session, messages.download_record(request))
            message = await self._in_thread(ask) if 4 * self._server.size > _LARGE_BYTES else ask()
            for part in messages.parts(message):
                await context.write(part)

    async def _upload(self, request: pb.UploadRequest, context: Any) -> pb.ReceiptReply:
        self._require_readable(request)
        name = self._require_session(request.session, context)
        with self._counted():
            self._transfers.count_upload(name)
        return await self._submitted(request.session, request.update)

    async def _upload_parts(self, sent: AsyncIterator[pb.Part], context: Any) -> pb.ReceiptReply:
        first = await self._first_part(sent)
        name = self._require_session(first.session, context)
        with self._counted():
            self._transfers.count_upload(name)
        async with self._transfers.of(name, "up", large=True):
            message = await self._whole(first, sent, max_update_bytes(self._server.size, 1.0))
            return await self._submitted(first.session, message)

    async def _submitted(self, session: str, message: bytes | bytearray) -> pb.ReceiptReply:
        submit = partial(self._server.submit, session, message)
        answer = await self._in_thread(submit) if len(message) > _LARGE_BYTES else submit()
        receipt = answer.result() if answer.done() else await asyncio.wrap_future(answer)
        log.debug("session %.4s: round %d makes version %d", session, receipt.round, receipt.version)
        return messages.receipt_message(receipt)

    async def _status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        self._require_readable(request)
        with self._counted():
            self._require(None, context)
        return messages.status_message(self._server.status())

    async def _export(self, request: pb.ExportRequest, context: Any) -> None:
        self._require_readable(request)
        with self._counted():
            self._require(None, context)
        async with self._transfers.of(context.peer(), "down", large=True):
            manifest, message = await self._in_thread(self._server.export)
            for part in messages.parts(message, manifest=manifest):
                await context.write(part)

    # What these share

    def _require(self, name: str | None, context: Any) -> None:
        if not self._security.open:
            metadata = dict(context.invocation_metadata() or ())
            self._gate.require(name, context.auth_context(), metadata)

    def _require_session(self, session: str, context: Any) -> str:
        name = self._server.participant(session)
        with self._counted():
            self._require(name, context)
        return name

    def _require_readable(self, request: Any) -> None:
        if request is None:
            with self._counted():
                raise MalformedUpdateError("the request is no message of this schema")

    async def _first_part(self, sent: AsyncIterator[pb.Part]) -> pb.Part:
        async for part in sent:
            self._require_readable(part)
            return part
        with self._counted():
            raise MalformedUpdateError("the stream holds no part")

    async def _whole(self, first: pb.Part, sent: AsyncIterator[pb.Part], most_bytes: int) -> bytearray:
        with self._counted():
            try:
                assembly = messages.Assembly(most_bytes)
                assembly.add(first)
                async for part in sent:
                    self._require_readable(part)
                    assembly.add(part)
                return assembly.take()
            except OverflowError as error:
                raise LimitExceededError(str(error)) from None
            except EOFError as error:
                raise MalformedUpdateError(str(error)) from None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A refusal that the core does not see itself is entered in its books as well."""
        try:
            yield
        except AdmissionError as error:
            self._server.count_rejection(error)
            raise

    async def _in_thread(self, work: Callable[[], T]) -> T:
        assert self._loop is not None
        return await self._loop.run_in_executor(None, work)

    def _wake(self) -> None:
        """Called in any thread, with the server's lock held."""
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # it closed in between
                self._loop.call_soon_threadsafe(self._signal)

    def _signal(self) -> None:
        assert self._changed is not None
        self._changed.set()
        self._changed = asyncio.Event()


async def _abort(context: Any, error: PPDLError) -> None:
    code = getattr(grpc.StatusCode, failures.code_of(error))
    await context.abort(code, str(error), ((failures.METADATA_KEY, type(error).__name__),))
