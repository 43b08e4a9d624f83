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
    StateError,
)
from lightning_ppdl.records import Membership
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.security import Gate, Limits, Security, is_loopback, read_file, split_address
from lightning_ppdl.server.transfers import Caller, Transfers
from lightning_ppdl.validation import require_name
from lightning_ppdl.wire import max_update_bytes

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

T = TypeVar("T")
Sent = AsyncIterator[Any]
"""What a client sends in one request: messages, None for what is none of the schema's."""

_LONGEST_WAIT_SECONDS = 20.0
"""For a turn, in one request: who waits longer asks again, which is a sign of life."""
_LARGE_BYTES = 4 * 2**20
"""From which size on a message is worked on in a thread, and others are answered meanwhile."""
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
        self._changed: asyncio.Event | None = None
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
        self._changed = asyncio.Event()
        self._transfers = Transfers(self._limits)
        self._server.watch(self._wake)
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
        single: dict[str, tuple[Callable[..., Any], Any, Any]] = {
            "Join": (self._join, pb.JoinRequest, pb.JoinReply),
            "TakeTurn": (self._take_turn, pb.TakeTurnRequest, pb.TakeTurnReply),
            "RenewTurn": (self._renew_turn, pb.SessionRequest, pb.EmptyReply),
            "EndTurn": (self._end_turn, pb.SessionRequest, pb.EmptyReply),
            "Upload": (self._upload, pb.UploadRequest, pb.ReceiptReply),
            "Leave": (self._leave, pb.SessionRequest, pb.EmptyReply),
            "Status": (self._status, pb.StatusRequest, pb.StatusReply),
        }
        # All are answered as if the client sent a stream: of a single message, too, gRPC would else read
        # the whole before anything here could tell who sends it, and wait for it for ever.
        ours = {
            name: _single_reply(self._answering(self._reading(handle)), request, reply)
            for name, (handle, request, reply) in single.items()
        }
        ours["OfferInitial"] = _single_reply(self._answering(self._offer_initial), pb.Part, pb.OfferReply)
        ours["UploadParts"] = _single_reply(self._answering(self._upload_parts), pb.Part, pb.ReceiptReply)
        for name, sends, request in (
            ("Download", self._download, pb.DownloadRequest),
            ("Export", self._export, pb.ExportRequest),
        ):
            ours[name] = _stream_reply(self._answering(self._reading(sends)), request, pb.Part)
        check = self._answering(self._public.check, public=True)
        reflect = self._answering(self._public.reflect, public=True)
        asked, answer = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        question, told = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        return tuple(
            grpc.method_handlers_generic_handler(service, methods)
            for service, methods in (
                (messages.SERVICE, ours),
                (HEALTH, {"Check": _single_reply(check, asked, answer)}),
                (REFLECTION, {"ServerReflectionInfo": _stream_reply(reflect, question, told)}),
            )
        )

    def _answering(
        self, handle: Callable[[Sent, Caller], Awaitable[Any]], public: bool = False
    ) -> Callable[[Sent, Any], Awaitable[Any]]:
        """``handle``, once it is known who asks. Its errors become status codes; no traceback ever reaches a
        client."""

        async def handler(sent: Sent, context: Any) -> Any:
            caller = Caller(context, self._limits.silence_seconds)
            try:
                if public:
                    return await handle(sent, caller)
                with self._counted():
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

    def _reading(
        self, handle: Callable[[Any, Caller], Awaitable[Any]]
    ) -> Callable[[Sent, Caller], Awaitable[Any]]:
        """``handle`` for a request that is a single message."""

        async def handler(sent: Sent, caller: Caller) -> Any:
            with self._counted():
                request = await self._next(sent, caller)
                if request is None:
                    raise MalformedUpdateError("the request holds no message")
            return await handle(request, caller)

        return handler

    # What is asked for, one method each

    async def _join(self, request: pb.JoinRequest, caller: Caller) -> pb.JoinReply:
        with self._counted():
            caller.require(request.participant)
        membership = await self._in_thread(partial(self._joined, request))
        log.info(
            "participant %r joined, after round %d",
            request.participant,
            membership.last_round,
            extra={
                "event": "joined",
                "participant": request.participant,
                "round": membership.last_round,
                "version": membership.version,
            },
        )
        return messages.membership_message(membership)

    def _joined(self, request: pb.JoinRequest) -> Membership:
        """In a thread: a manifest can be long."""
        with self._counted():
            manifest = messages.manifest_record(request.manifest)
            if manifest.size > self._limits.max_parameters:
                raise JoinRefusedError(
                    f"{manifest.size} shared entries are more than the {self._limits.max_parameters} that "
                    f"this server takes; its operator can raise max_parameters"
                )
        _ = manifest.fingerprint  # computed now, and not while the server is locked
        try:
            return self._server.join(request.participant, manifest, failures.HERE)
        except ConfigurationError as error:
            require_name("participant", request.participant)
            # It is the server's own configuration then, whose files are nobody else's business.
            log.error("participant %r could not join: %s", request.participant, error)
            raise ServerFailedError(
                "the server cannot begin with the initial parameters that it was given for this module; its "
                "log says why"
            ) from None

    async def _offer_initial(self, sent: Sent, caller: Caller) -> pb.OfferReply:
        first = await self._first_part(sent, caller)
        name = self._require_session(first.session, caller)
        async with self._transfers.of(name, "up", large=True, caller=caller):
            raw = await self._whole(first, sent, caller, 4 * self._server.size)
            with self._counted():
                if len(raw) != 4 * self._server.size:
                    raise JoinRefusedError(
                        f"initial parameters must be finite float32 of shape {(self._server.size,)}, "
                        f"{4 * self._server.size} bytes, not {len(raw)}"
                    )
            offer = partial(self._server.offer_initial, first.session, messages.vector_record(raw))
            return pb.OfferReply(taken=await self._in_thread(offer))

    async def _take_turn(self, request: pb.TakeTurnRequest, caller: Caller) -> pb.TakeTurnReply:
        self._require_session(request.session, caller)
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

    async def _renew_turn(self, request: pb.SessionRequest, caller: Caller) -> pb.EmptyReply:
        self._require_session(request.session, caller)
        self._server.renew_turn(request.session)
        return pb.EmptyReply()

    async def _end_turn(self, request: pb.SessionRequest, caller: Caller) -> pb.EmptyReply:
        self._require_session(request.session, caller)
        self._server.end_turn(request.session)
        return pb.EmptyReply()

    async def _leave(self, request: pb.SessionRequest, caller: Caller) -> pb.EmptyReply:
        name = self._require_session(request.session, caller)
        await self._in_thread(partial(self._server.leave, request.session))
        log.info("participant %r left", name, extra={"event": "left", "participant": name})
        return pb.EmptyReply()

    async def _download(self, request: pb.DownloadRequest, caller: Caller) -> None:
        name = self._require_session(request.session, caller)
        large = 4 * self._server.size > messages.PART_BYTES
        async with self._transfers.of(name, "down", large, caller):
            ask = partial(self._server.download, request.session, messages.download_record(request))
            message = await self._in_thread(ask) if 4 * self._server.size > _LARGE_BYTES else ask()
            for part in messages.parts(message):
                await caller.send(part)

    async def _upload(self, request: pb.UploadRequest, caller: Caller) -> pb.ReceiptReply:
        name = self._require_session(request.session, caller)
        with self._counted():
            self._transfers.count_upload(name)
        return await self._submitted(name, request.session, request.update)

    async def _upload_parts(self, sent: Sent, caller: Caller) -> pb.ReceiptReply:
        first = await self._first_part(sent, caller)
        name = self._require_session(first.session, caller)
        with self._counted():
            self._transfers.count_upload(name)
        async with self._transfers.of(name, "up", large=True, caller=caller):
            message = await self._whole(first, sent, caller, max_update_bytes(self._server.size, 1.0))
            return await self._submitted(name, first.session, message)

    async def _submitted(self, name: str, session: str, message: bytes | bytearray) -> pb.ReceiptReply:
        submit = partial(self._server.submit, session, message)
        answer = await self._in_thread(submit) if len(message) > _LARGE_BYTES else submit()
        receipt = answer.result() if answer.done() else await asyncio.wrap_future(answer)
        if log.isEnabledFor(logging.DEBUG):  # once for each upload: no work for a line that nobody reads
            log.debug(
                "participant %r: round %d makes version %d, staleness %d, %d bytes",
                name,
                receipt.round,
                receipt.version,
                receipt.staleness,
                len(message),
                extra={"event": "upload", "participant": name, "bytes": len(message), **vars(receipt)},
            )
        return messages.receipt_message(receipt)

    async def _status(self, request: pb.StatusRequest, caller: Caller) -> pb.StatusReply:
        return messages.status_message(self._server.status())

    async def _export(self, request: pb.ExportRequest, caller: Caller) -> None:
        who = caller.address if caller.names is None else ",".join(sorted(caller.names))
        async with self._transfers.of(who, "export", large=True, caller=caller):
            manifest, message = await self._in_thread(self._server.export)
            for part in messages.parts(message, manifest=manifest):
                await caller.send(part)

    # What these share

    def _require_session(self, session: str, caller: Caller) -> str:
        name = self._server.participant(session)
        with self._counted():
            caller.require(name)
        return name

    async def _next(self, sent: Sent, caller: Caller) -> Any:
        """The next message; None after the last."""
        received = await caller.receive(sent)
        if received is messages.UNREADABLE:
            raise MalformedUpdateError("the request is no message of this schema")
        return received

    async def _first_part(self, sent: Sent, caller: Caller) -> pb.Part:
        with self._counted():
            part: pb.Part | None = await self._next(sent, caller)
            if part is None:
                raise MalformedUpdateError("the stream holds no part")
            if part.HasField("manifest"):
                raise MalformedUpdateError("the first part holds a manifest, which belongs to a join")
        return part

    async def _whole(self, first: pb.Part, sent: Sent, caller: Caller, most_bytes: int) -> bytearray:
        with self._counted():
            try:
                assembly = messages.Assembly(most_bytes)
                assembly.add(first)
                while (part := await self._next(sent, caller)) is not None:
                    assembly.add(part)
                return assembly.take()
            except OverflowError as error:
                raise LimitExceededError(str(error)) from None
            except (EOFError, ValueError) as error:
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
        running = self._loop.run_in_executor(None, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # Work goes on in its thread, and holds its message: until then its place is not another's.
            await asyncio.wait([running])
            raise

    def _wake(self) -> None:
        """Called in any thread, with the server's lock held."""
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # it closed in between
                self._loop.call_soon_threadsafe(self._signal)

    def _signal(self) -> None:
        assert self._changed is not None
        self._changed.set()
        self._changed = asyncio.Event()


def _single_reply(handle: Any, request: Any, reply: Any) -> Any:
    return grpc.stream_unary_rpc_method_handler(handle, messages.parser(request), reply.SerializeToString)


def _stream_reply(handle: Any, request: Any, reply: Any) -> Any:
    return grpc.stream_stream_rpc_method_handler(handle, messages.parser(request), reply.SerializeToString)


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
