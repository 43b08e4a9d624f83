"""The mean of sparse updates, in memory that does not depend on their number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_ppdl.records import SparseUpdate


class Mean:
    """A running mean over updates of one vector; an entry that an update leaves out counts as zero in it.

    Summed in float64 and rounded to float32 once, so the order of the updates does not show unless
    their sizes differ by more than 2**29. Nine bytes an entry.

    Edge cases: the mean of one update is that update; entries uploaded by anyone are in the mean even
    where their values cancel; of updates that are all empty the mean is empty; of none there is none.

    >>> mean = Mean(4)
    >>> mean.add(SparseUpdate("anna", 1, 7, np.array([0, 2]), np.array([1, 2], np.float32)))
    >>> mean.add(SparseUpdate("ben", 5, 7, np.array([2, 3]), np.array([4, 8], np.float32)))
    >>> update = mean.take(cycle=3)
    >>> update.indices.tolist(), update.values.tolist(), update.base_version
    ([0, 2, 3], [0.5, 3.0, 4.0], 7)
    """

    def __init__(self, size: int) -> None:
        self._sum: npt.NDArray[np.float64] = np.zeros(size)
        self._uploaded = np.zeros(size, dtype=np.bool_)
        self._base_version = 0
        self.count = 0
        """Updates added since the last :meth:`take`."""

    def add(self, update: SparseUpdate) -> None:
        """Count ``update`` in. All that are added together have the same base version."""
        # Indices are strictly increasing, so none is hit twice.
        self._sum[update.indices] += update.values
        self._uploaded[update.indices] = True
        self._base_version = update.base_version
        self.count += 1

    def take(self, cycle: int) -> SparseUpdate:
        """The mean as one update, of nobody in particular and with the cycle as its round. Begins anew."""
        indices = np.flatnonzero(self._uploaded)
        values = (self._sum[indices] / self.count).astype(np.float32)
        self.clear()
        return SparseUpdate("", cycle, self._base_version, indices, values)

    def clear(self) -> None:
        """Forget what was added."""
        self._sum[:] = 0
        self._uploaded[:] = False
        self.count = 0
