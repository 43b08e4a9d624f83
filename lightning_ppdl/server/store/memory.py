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

    parameters: Vector
    stat: Vector

    def __init__(self, initial: Vector) -> None:
        self.parameters = np.array(initial, dtype=np.float32)
        self.stat = np.zeros(len(initial), dtype=np.float32)
        self.changed_at = np.zeros(len(initial), dtype=np.uint32)
        self.version = 0
        self.increment = 1.0

    def commit(self, change: Change, uploaded: Indices, decay: float) -> int:
        self.version += 1
        where = slice(None) if change.indices is None else change.indices
        # add.at takes half the time of an indexed +=; no index occurs twice.
        if change.indices is None:
            self.parameters += change.values
        else:
            np.add.at(self.parameters, change.indices, change.values)
        self.changed_at[where] = self.version
        # Growing the increment orders the entries as decaying all of stat would, for O(k) not O(P).
        self.increment /= decay
        if self.increment > _LARGEST_INCREMENT:
            self.stat /= np.float32(self.increment)
            self.increment = 1.0
        np.add.at(self.stat, uploaded, np.float32(self.increment))
        return self.version
