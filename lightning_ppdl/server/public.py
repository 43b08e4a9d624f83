"""What a gRPC server answers to everybody: that it is well, and which services it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lightning_ppdl.errors import LimitExceededError, MalformedUpdateError
from lightning_ppdl.server.transfers import Caller

HEALTH, REFLECTION = health.SERVICE_NAME, reflection.SERVICE_NAME

_MOST_AT_ONCE = 50
_LONGEST_SECONDS = 30.0


class PublicAnswers:
    """Health checks and reflection. Nobody proves a name here, so nothing here may last.

    Health is checked, not watched: a watch goes on for ever.

    Args:
        services: The names of all services.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self.serving = True
        self._services = {"", *services}
        self._reflection = reflection.aio.ReflectionServicer(services)
        self._under_way = 0

    async def check(self, sent: AsyncIterator[object], caller: Caller) -> health_pb2.HealthCheckResponse:
        """Whether a service is well; one that is not known is UNKNOWN."""
        with self._briefly(caller):
            request = await caller.receive(sent)
            if not isinstance(request, health_pb2.HealthCheckRequest):
                raise MalformedUpdateError("the request is no message of this schema")
            kinds = health_pb2.HealthCheckResponse
            if request.service not in self._services:
                return kinds(status=kinds.SERVICE_UNKNOWN)
            return kinds(status=kinds.SERVING if self.serving else kinds.NOT_SERVING)

    async def reflect(self, sent: AsyncIterator[object], caller: Caller) -> None:
        """Which services there are, and their schema."""
        with self._briefly(caller):
            async for answer in self._reflection.ServerReflectionInfo(_questions(sent, caller), None):
                await caller.send(answer)

    @contextmanager
    def _briefly(self, caller: Caller) -> Iterator[None]:
        if self._under_way >= _MOST_AT_ONCE:
            raise LimitExceededError(f"{_MOST_AT_ONCE} requests of this kind are under way")
        limit = asyncio.get_running_loop().call_later(
            _LONGEST_SECONDS, caller.end, f"a request of this kind ends after {_LONGEST_SECONDS:g} seconds"
        )
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            limit.cancel()


async def _questions(
    sent: AsyncIterator[object], caller: Caller
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    while isinstance(question := await caller.receive(sent), reflection_pb2.ServerReflectionRequest):
        yield question
