"""What the server needs of a place that keeps the shared vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_ppdl.records import Indices, Vector


@dataclass(frozen=True)
class Change:
    """What a merge adds to the shared vector.

    Args:
        indices: int64 (k,), strictly increasing; None for all entries.
        values: float32 (k,) or (P,).
    """

    indices: Indices | None
    values: Vector


class Store(ABC):
    """The shared vector and two books about each entry, changed together by :meth:`commit`.

    The server calls a store under its own lock: one writer at a time.
    """

    parameters: Vector
    """float32 (P,): the shared values. Read-only for everyone but the store."""

    stat: Vector
    """float32 (P,): how often each entry was uploaded, with decay (the paper's stat), up to a common
    factor: only its order means something."""

    changed_at: npt.NDArray[np.uint32]
    """uint32 (P,): the version that last changed each entry, 0 if none did."""

    version: int
    """Number of commits so far."""

    increment: float
    """What the next upload of an entry adds to its stat."""

    @abstractmethod
    def commit(self, change: Change, uploaded: Indices, decay: float) -> int:
        """Add ``change``, count one upload of the entries ``uploaded``, and return the new version.

        Args:
            change: What to add to the parameters.
            uploaded: int64 (k,): the entries whose stat rises by one.
            decay: beta in (0, 1]: what every stat is multiplied by first.
        """
