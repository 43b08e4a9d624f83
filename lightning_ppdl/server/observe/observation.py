"""From what a server holds to what its operators see of it."""

from __future__ import annotations

from lightning_ppdl.server.holdings import Holdings
from lightning_ppdl.server.observe.status import ServiceStatus


def observation(held: Holdings, protocol: object, merge: object, seconds: float) -> ServiceStatus:
    """What ``held`` is like now; its lock is held by the caller.

    Args:
        held: What the server holds.
        protocol, merge: The exchange protocol and the merge rule.
        seconds: Since the server started.
    """
    status = held.status()
    return ServiceStatus(
        protocol=type(protocol).__name__,
        merge=type(merge).__name__,
        study=held.study,
        version=status.version,
        parameters=status.parameters,
        started_seconds_ago=seconds,
        awaited=status.awaited,
        members=status.members,
        traffic=held.books.traffic.snapshot(),
        journal_bytes=None if held.durability is None else held.durability.state.journal_bytes,
        durable=held.durability is not None,
    )
