"""The shared vector in this process's memory: 12 bytes an entry, whatever the number of participants."""

from __future__ import annotations

import numpy as np

from lightning_ppdl.records import Indices, Vector
from lightning_ppdl.server.store.base import Change, Store

_LARGEST_INCREMENT = 1e24


class MemoryStore(Store):
    """Keeps everything in numpy arrays.

    Args:
        initial: float32 (P,), copied.
    """

    def __init__(self, initial: Vector) -> None:
        self.parameters = np.array(initial, dtype=np.float32)
        self.stat = np.zeros(len(initial), dtype=np.float32)
        self.changed_at = np.zeros(len(initial), dtype=np.uint32)
        self.version = 0
        self._increment = 1.0

    def commit(self, change: Change, uploaded: Indices, decay: float) -> int:
        self.version += 1
        where = slice(None) if change.indices is None else change.indices
        self.parameters[where] += change.values
        self.changed_at[where] = self.version
        # Growing the increment orders the entries as decaying all of stat would, for O(k) not O(P).
        self._increment /= decay
        if self._increment > _LARGEST_INCREMENT:
            self.stat /= np.float32(self._increment)
            self._increment = 1.0
        self.stat[uploaded] += np.float32(self._increment)
        return self.version
