"""What a gRPC server answers to participants: one method for each of the schema's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from lightning_ppdl.errors import (
    AdmissionError,
    ConfigurationError,
    JoinRefusedError,
    ServerFailedError,
)
from lightning_ppdl.records import Membership
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.reading import Sent, first_part, single_message, whole_message
from lightning_ppdl.server.security import Limits
from lightning_ppdl.server.transfers import Caller, Transfers
from lightning_ppdl.validation import require_name
from lightning_ppdl.wire import max_update_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Answers a request, once it is known who asks.
Handle: TypeAlias = Callable[[Sent, Caller], Awaitable[Any]]

_LONGEST_WAIT_SECONDS = 20.0
"""For a turn, in one request: who waits longer asks again, which is a sign of life."""
_LARGE_BYTES = 4 * 2**20
"""From which size on a message is worked on in a thread, and others are answered meanwhile."""


@dataclass(frozen=True)
class Method:
    """One method of a service.

    Args:
        handle: Answers a request.
        request: The class of what is sent.
        reply: The class of the answer, or of its parts.
        streams: Whether ``handle`` sends the answer itself, message by message.
    """

    handle: Handle
    request: Any
    reply: Any
    streams: bool = False


class Answers:
    """Asks a :class:`~lightning_ppdl.ParameterServer` what participants ask.

    To be made in the event loop that answers. What is short is done there, what takes long in a thread.

    Args:
        server: What is served.
        limits, transfers: What clients may use, and how much of it they do.
    """

    def __init__(self, server: ParameterServer, limits: Limits, transfers: Transfers) -> None:
        self._server = server
        self._limits = limits
        self._transfers = transfers
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        server.watch(self._wake)

    def methods(self) -> dict[str, Method]:
        """All of the schema's, by name."""
        single: dict[str, tuple[Callable[..., Awaitable[Any]], Any, Any]] = {
            "Join": (self._join, pb.JoinRequest, pb.JoinReply),
            "TakeTurn": (self._take_turn, pb.TakeTurnRequest, pb.TakeTurnReply),
            "RenewTurn": (self._renew_turn, pb.SessionRequest, pb.EmptyReply),
            "EndTurn": (self._end_turn, pb.SessionRequest, pb.EmptyReply),
            "Upload": (self._upload, pb.UploadRequest, pb.ReceiptReply),
            "Leave": (self._leave, pb.SessionRequest, pb.EmptyReply),
            "Status": (self._status, pb.StatusRequest, pb.StatusReply),
        }
        streamed: dict[str, tuple[Callable[..., Awaitable[Any]], Any]] = {
            "Download": (self._download, pb.DownloadRequest),
            "Export": (self._export, pb.ExportRequest),
        }
        return {
            **{
                name: Method(self._reading(answer), request, reply)
                for name, (answer, request, reply) in single.items()
            },
            **{
                name: Method(self._reading(send), request, pb.Part, streams=True)
                for name, (send, request) in streamed.items()
            },
            "OfferInitial": Method(self._offer_initial, pb.Part, pb.OfferReply),
            "UploadParts": Method(self._upload_parts, pb.Part, pb.ReceiptReply),
        }

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A refusal that the core does not see itself is entered in its books as well."""
        try:
            yield
        except AdmissionError as error:
            self._server.count_rejection(error)
            raise

    async def _join(self, request: pb.JoinRequest, caller: Caller) -> pb.JoinReply:
        with self.counted():
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
        with self.counted():
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
        with self.counted():
            first = await first_part(sent, caller)
        name = self._require_session(first.session, caller)
        async with self._transfers.of(name, "up", large=True, caller=caller):
            with self.counted():
                raw = await whole_message(first, sent, caller, 4 * self._server.size)
                if len(raw) != 4 * self._server.size:
                    raise JoinRefusedError(
                        f"initial parameters must be finite float32 of shape {(self._server.size,)}, "
                        f"{4 * self._server.size} bytes, not {len(raw)}"
                    )
            offer = partial(self._server.offer_initial, first.session, messages.vector_record(raw))
            return pb.OfferReply(taken=await self._in_thread(offer))

    async def _take_turn(self, request: pb.TakeTurnRequest, caller: Caller) -> pb.TakeTurnReply:
        self._require_session(request.session, caller)
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
        with self.counted():
            self._transfers.count_upload(name)
        return await self._submitted(name, request.session, request.update)

    async def _upload_parts(self, sent: Sent, caller: Caller) -> pb.ReceiptReply:
        with self.counted():
            first = await first_part(sent, caller)
        name = self._require_session(first.session, caller)
        with self.counted():
            self._transfers.count_upload(name)
        async with self._transfers.of(name, "up", large=True, caller=caller):
            with self.counted():
                message = await whole_message(first, sent, caller, max_update_bytes(self._server.size, 1.0))
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

    def _reading(self, answer: Callable[[Any, Caller], Awaitable[Any]]) -> Handle:
        """``answer`` for a request that is a single message."""

        async def handle(sent: Sent, caller: Caller) -> Any:
            with self.counted():
                request = await single_message(sent, caller)
            return await answer(request, caller)

        return handle

    def _require_session(self, session: str, caller: Caller) -> str:
        name = self._server.participant(session)
        with self.counted():
            caller.require(name)
        return name

    async def _in_thread(self, work: Callable[[], T]) -> T:
        running = self._loop.run_in_executor(None, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # Work goes on in its thread, and holds its message: until then its place is not another's.
            await asyncio.wait([running])
            raise

    def _wake(self) -> None:
        """Called in any thread, with the server's lock held."""
        if not self._loop.is_closed():
            with suppress(RuntimeError):  # it closed in between
                self._loop.call_soon_threadsafe(self._signal)

    def _signal(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
