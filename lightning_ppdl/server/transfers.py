"""Uploads and downloads that are under way over a network, each within its limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from lightning_ppdl.errors import LimitExceededError
from lightning_ppdl.server.security import Limits

_MINUTE = 60.0


class Transfers:
    """Keeps a slow or silent client from holding the server.

    To be used in one event loop. What it remembers grows with the participants, not with their uploads.

    Args:
        limits: What each may use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_transfers)
        self._under_way: dict[tuple[str, str], asyncio.Task[Any]] = {}
        # By participant, of those that uploaded in the last minute: the minute's start, and how often.
        self._uploads: dict[str, tuple[float, int]] = {}

    @asynccontextmanager
    async def of(self, name: str, direction: Literal["up", "down"], large: bool) -> AsyncIterator[None]:
        """The transfer of one participant in one direction.

        An earlier one that is still under way ends: its connection may well be dead. One that takes too
        long ends, and so does one that waits too long for a place.
        """
        task = asyncio.current_task()
        assert task is not None
        earlier = self._under_way.get((name, direction))
        if earlier is not None:
            earlier.cancel()
        self._under_way[name, direction] = task
        limit = asyncio.get_running_loop().call_later(self._limits.transfer_seconds, task.cancel)
        try:
            if large:
                async with self._places:
                    yield
            else:
                yield
        finally:
            limit.cancel()
            if self._under_way.get((name, direction)) is task:
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
