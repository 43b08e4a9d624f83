"""What a round exchanged, for loggers and for people."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_ppdl.records import Receipt, SparseUpdate


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


@dataclass(frozen=True)
class Sent:
    """A release on its way, and what is known of its round.

    Args:
        message: The update, encoded.
        update: The same.
        size: P.
        local: float32 (P,): the parameters after the round, where the next one starts if it does
            not wait.

    The others are as in :class:`RoundReport`, without the upload's time.
    """

    message: bytes
    update: SparseUpdate
    size: int
    clamped_fraction: float
    downloaded_bytes: int
    exchange_seconds: float
    wait_seconds: float
    local: Tensor

    def report(self, receipt: Receipt | None, seconds: float = 0.0) -> RoundReport:
        """The round's report, once it is known what came of the upload.

        Args:
            receipt: None if it was not merged, or that is not known.
            seconds: That training waited for it.
        """
        update = self.update
        return RoundReport(
            round=update.round,
            merged=receipt is not None,
            uploaded_bytes=len(self.message),
            downloaded_bytes=self.downloaded_bytes,
            released_values=len(update.indices),
            uploaded_fraction=len(update.indices) / self.size,
            clamped_fraction=self.clamped_fraction,
            staleness=0 if receipt is None else receipt.staleness,
            update_norm=float(np.linalg.norm(update.values)),
            exchange_seconds=self.exchange_seconds + seconds,
            wait_seconds=self.wait_seconds,
        )
