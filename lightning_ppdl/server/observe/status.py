"""What the status page and the metrics are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_ppdl.records import MemberStatus
from lightning_ppdl.server.traffic import TrafficStatus


@dataclass(frozen=True)
class ServiceStatus:
    """A running parameter server at one moment. Discloses who takes part; holds no parameter value.

    Args:
        protocol: Name of the exchange protocol.
        merge: Name of the merge rule.
        study: Identity of the collaboration.
        version: Merges so far.
        parameters: Entries of the shared vector (P), 0 before the first join.
        started_seconds_ago: Seconds since the server started.
        awaited: Whom those who wait for a turn are waiting for; empty without turns.
        members: All that ever joined, in the order in which they first did.
        traffic: What passed since the server started.
        journal_bytes: Size of the journal on disk; None without one.
        durable: Whether the collaboration goes on where it was after a restart.
    """

    protocol: str
    merge: str
    study: str
    version: int
    parameters: int
    started_seconds_ago: float
    awaited: tuple[str, ...]
    members: tuple[MemberStatus, ...]
    traffic: TrafficStatus
    journal_bytes: int | None = None
    durable: bool = False


def as_json(status: ServiceStatus) -> dict[str, Any]:
    """The status as plain dicts, lists and numbers, under the records' own names."""
    plain = asdict(status)
    plain["traffic"]["rejections"] = dict(status.traffic.rejections)
    return plain
