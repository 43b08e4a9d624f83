"""A vector's past: recent versions as they were, older ones ever more coarsely."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

from lightning_ppdl.records import Indices, Vector


class History:
    """Keeps O(log age) copies of a growing sequence of versions, and interpolates between them.

    A copy is dropped once the gap that it leaves is at most half as wide as it is old: what happened
    29 versions ago is known to within 14, what happened two versions ago exactly.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[int, Vector]] = []

    def record(self, version: int, vector: Vector, horizon: int) -> None:
        """Copy ``vector``, float32 (P,), as ``version``; forget what is older than ``horizon`` versions."""
        self._copies.append((version, vector.copy()))
        kept = [self._copies[-1]]
        for position in range(len(self._copies) - 2, 0, -1):
            before = self._copies[position - 1][0]
            if 2 * (kept[-1][0] - before) > version - before:
                kept.append(self._copies[position])
        if len(self._copies) > 1:
            kept.append(self._copies[0])
        while len(kept) > 2 and kept[-2][0] < version - horizon:
            kept.pop()
        self._copies = kept[::-1]

    def state(self) -> dict[str, Vector]:
        """The copies by version, for :meth:`restore`; not copied again."""
        return {str(version): vector for version, vector in self._copies}

    def restore(self, state: Mapping[str, Vector]) -> None:
        """Go on from :meth:`state`."""
        self._copies = sorted(
            ((int(version), vector) for version, vector in state.items()), key=itemgetter(0)
        )

    def at(self, version: int, indices: Indices) -> Vector:
        """The entries ``indices`` as they were at ``version``, float32 (k,); linear between two copies."""
        later = next(place for place, (kept, _) in enumerate(self._copies) if kept >= version)
        after, end = self._copies[later]
        if later == 0 or after == version:
            return end[indices]
        before, start = self._copies[later - 1]
        share = (version - before) / (after - before)
        between: Vector = start[indices] + share * (end[indices] - start[indices])
        return between
