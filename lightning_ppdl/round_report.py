"""What a round exchanged, for loggers and for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundReport:
    """What one round exchanged.

    Args:
        round: Counts from 1.
        merged: Whether the server took the update.
        uploaded_bytes, downloaded_bytes: Sizes of the encoded messages.
        released_values: Entries released, merged or not.
        uploaded_fraction: The same over all shared entries.
        clamped_fraction: Share of the released values that the bound changed.
        staleness: Updates of others merged in between; 0 where not merged.
        update_norm: L2 norm of the released update.
        exchange_seconds: Spent in download, release and upload.
        wait_seconds: Spent waiting for the turn.
    """

    round: int
    merged: bool
    uploaded_bytes: int
    downloaded_bytes: int
    released_values: int
    uploaded_fraction: float
    clamped_fraction: float
    staleness: int
    update_norm: float
    exchange_seconds: float
    wait_seconds: float
