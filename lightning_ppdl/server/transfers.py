"""Requests, uploads and downloads that are under way over a network, each within its limits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, TypeVar

from lightning_ppdl.errors import LimitExceededError, ServerUnavailableError
from lightning_ppdl.server.security import Limits, require_acting_as

T = TypeVar("T")

_MINUTE = 60.0
_EXPORTS = 2
"""How many may be under way at once."""


class Caller:
    """One request that is under way, and who sent it.

    To be made in the task that answers the request.

    Args:
        context: gRPC's.
        silence_seconds: How long it is waited for the other side.
    """

    def __init__(self, context: Any, silence_seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._context = context
        self._silence_seconds = silence_seconds
        self.names: frozenset[str] | None = None
        """Whom it may act as, None for anybody."""
        self.ended: str | None = None
        """Why the server has ended the request, None if it has not."""

    @property
    def address(self) -> str:
        """Of its connection."""
        return str(self._context.peer())

    def require(self, name: str) -> None:
        """Raise AuthenticationError unless it may act as ``name``."""
        require_acting_as(name, self.names)

    def end(self, why: str) -> None:
        """Cancel the request. :meth:`interrupted` tells this from its being cancelled by the client."""
        self.ended = why
        self._task.cancel()

    def interrupted(self) -> ServerUnavailableError | None:
        """To be called when the request was cancelled: what the client is told, None if it went away."""
        if self.ended is None:
            return None
        if hasattr(self._task, "uncancel"):  # Python 3.11
            self._task.uncancel()
        return ServerUnavailableError(self.ended)

    async def receive(self, sent: AsyncIterator[T]) -> T | None:
        """What the client sends next; None if nothing more comes."""
        with suppress(StopAsyncIteration):
            return await self._hear(anext(sent))
        return None

    async def send(self, message: object) -> None:
        """Send ``message``, as soon as the client takes it."""
        await self._hear(self._context.write(message))

    async def _hear(self, waiting: Awaitable[T]) -> T:
        timer = asyncio.get_running_loop().call_later(
            self._silence_seconds,
            self.end,
            f"nothing was sent or taken for {self._silence_seconds:g} seconds in the middle of a request",
        )
        try:
            return await waiting
        finally:
            timer.cancel()


class Transfers:
    """Keeps a slow or silent client from holding the server.

    To be used in one event loop. What it remembers grows with the participants, not with their uploads.

    Args:
        limits: What each may use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_transfers)
        # Apart, so that whoever is slow to take an export keeps no participant waiting.
        self._export_places = asyncio.Semaphore(_EXPORTS)
        self._requests = 0
        self._requests_of: Counter[frozenset[str]] = Counter()
        self._under_way: dict[tuple[str, str], Caller] = {}
        # By participant: when the minute of its last upload began, and how many there were in it.
        self._uploads: dict[str, tuple[float, int]] = {}

    def admit(self, caller: Caller) -> None:
        """Let a request begin; :meth:`dismiss` must follow.

        Raises:
            LimitExceededError: if it is one too many of this participant.
            ServerUnavailableError: if it is one too many of all.
        """
        who = caller.names
        if self._requests >= self._limits.max_requests:
            raise ServerUnavailableError(
                f"{self._limits.max_requests} requests are under way, and this server takes no more at once"
            )
        if who is not None and self._requests_of[who] >= self._limits.max_requests_each:
            raise LimitExceededError(
                f"{self._limits.max_requests_each} requests of this participant are under way, and this "
                f"server takes no more at once of one"
            )
        self._requests += 1
        if who is not None:
            self._requests_of[who] += 1

    def dismiss(self, caller: Caller) -> None:
        """A request that was admitted has ended."""
        self._requests -= 1
        if caller.names is not None:
            self._requests_of[caller.names] -= 1
            if not self._requests_of[caller.names]:
                del self._requests_of[caller.names]

    @asynccontextmanager
    async def of(
        self, name: str, direction: Literal["up", "down", "export"], large: bool, caller: Caller
    ) -> AsyncIterator[None]:
        """The transfer of one participant in one direction.

        An earlier one that is still under way ends: its connection may well be dead. One that takes too
        long ends, and so does one that waits too long for a place.
        """
        earlier = self._under_way.get((name, direction))
        if earlier is not None:
            earlier.end("another transfer of the same participant has begun")
        self._under_way[name, direction] = caller
        limit = asyncio.get_running_loop().call_later(
            self._limits.transfer_seconds,
            caller.end,
            f"the transfer took longer than {self._limits.transfer_seconds:g} seconds",
        )
        try:
            if large:
                async with self._export_places if direction == "export" else self._places:
                    yield
            else:
                yield
        finally:
            limit.cancel()
            if self._under_way.get((name, direction)) is caller:
                del self._under_way[name, direction]

    def count_upload(self, name: str) -> None:
        """Enter an upload of participant ``name``.

        Raises:
            LimitExceededError: if it is one too many in this minute.
        """
        most = self._limits.uploads_per_minute
        if most is None:
            return
        now = time.monotonic()
        began, count = self._uploads.get(name, (now, 0))
        if now - began >= _MINUTE:
            began, count = now, 0
        if count >= most:
            raise LimitExceededError(
                f"participant {name!r} has uploaded {count} times within a minute, and this server takes no "
                f"more; make rounds longer, or ask its operator to raise uploads_per_minute"
            )
        self._uploads[name] = (began, count + 1)
