"""What passed through the server: totals, two histograms, and the last two hours minute by minute.

Its memory is the same after one upload and after a year of them, whoever sends them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

MINUTES = 120
"""How far back the uploads per minute go."""

_MOST_REASONS = 64
_OTHER = "other"
_STALENESS_BOUNDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_WAIT_BOUNDS_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


@dataclass(frozen=True)
class Histogram:
    """How often values fell between bounds.

    Args:
        bounds: The largest value of each bucket but the last, increasing.
        counts: Values in each bucket, one more than bounds: the last holds what is above all of them.
        total: Sum of all values.

    >>> Histogram(bounds=(0.0, 1.0, 2.0), counts=(5, 3, 1, 1), total=12.0).cumulative
    (5, 8, 9, 10)
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    @property
    def cumulative(self) -> tuple[int, ...]:
        """Values up to each bound; the last is :attr:`count`."""
        return tuple(accumulate(self.counts))

    @property
    def median_bucket(self) -> int | None:
        """Position of the bucket with the (lower) median in it; None without values."""
        half = (self.count + 1) // 2
        return bisect_left(self.cumulative, half) if half else None


@dataclass(frozen=True)
class TrafficStatus:
    """What passed until one moment, for others to read; holds no parameter value.

    Args:
        uploads, uploaded_bytes: Accepted uploads, and their size as encoded.
        downloads, downloaded_bytes: Served downloads, and their size as encoded.
        rejections: Refused requests by reason, in the order in which reasons first came up.
        staleness: Of accepted uploads, in updates of others.
        turn_wait_seconds: How long participants waited for their turn.
        uploads_per_minute: Of the last :data:`MINUTES` minutes, oldest first. The last one is not over.
    """

    uploads: int
    uploaded_bytes: int
    downloads: int
    downloaded_bytes: int
    rejections: tuple[tuple[str, int], ...]
    staleness: Histogram
    turn_wait_seconds: Histogram
    uploads_per_minute: tuple[int, ...]


class Traffic:
    """The running book behind :class:`TrafficStatus`.

    Not thread-safe: the server calls it with its lock held. Each entry takes about a microsecond.

    Args:
        clock: Seconds, monotonic. Minutes are counted from its reading now.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.uploads = 0
        self.uploaded_bytes = 0
        self.downloads = 0
        self.downloaded_bytes = 0
        self._rejections: dict[str, int] = {}
        self._staleness = _Tally(_STALENESS_BOUNDS)
        self._waits = _Tally(_WAIT_BOUNDS_SECONDS)
        self._per_minute = _Minutes(clock)

    def upload(self, encoded_bytes: int, staleness: int) -> None:
        """Enter an accepted upload. One that was answered with its first receipt is not entered again."""
        self.uploads += 1
        self.uploaded_bytes += encoded_bytes
        self._staleness.add(staleness)
        self._per_minute.add()

    def download(self, encoded_bytes: int) -> None:
        """Enter a served download."""
        self.downloads += 1
        self.downloaded_bytes += encoded_bytes

    def reject(self, reason: str) -> None:
        """Enter a refused request. After 64 different reasons, new ones are entered as ``"other"``."""
        if reason not in self._rejections and len(self._rejections) >= _MOST_REASONS:
            reason = _OTHER
        self._rejections[reason] = self._rejections.get(reason, 0) + 1

    def waited(self, seconds: float) -> None:
        """Enter how long a participant waited for the turn that it now has. Below 0 counts as 0."""
        self._waits.add(max(0.0, seconds))

    def snapshot(self) -> TrafficStatus:
        """The book as it is now."""
        return TrafficStatus(
            uploads=self.uploads,
            uploaded_bytes=self.uploaded_bytes,
            downloads=self.downloads,
            downloaded_bytes=self.downloaded_bytes,
            rejections=tuple(self._rejections.items()),
            staleness=self._staleness.histogram(),
            turn_wait_seconds=self._waits.histogram(),
            uploads_per_minute=self._per_minute.counts(),
        )


class _Tally:
    """A histogram that is still growing."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def histogram(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


class _Minutes:
    """Events of the last minutes. A ring: minute m is counted at m modulo its length."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._minute = 0
        self._counts = [0] * MINUTES

    def add(self) -> None:
        self._advance()
        self._counts[self._minute % MINUTES] += 1

    def counts(self) -> tuple[int, ...]:
        """Oldest first; the last is the minute that is not over."""
        self._advance()
        oldest = (self._minute + 1) % MINUTES
        return tuple(self._counts[oldest:] + self._counts[:oldest])

    def _advance(self) -> None:
        minute = int((self._clock() - self._began) // 60)
        # After a long silence each place is emptied once, not once for every minute that passed.
        for passed in range(max(self._minute + 1, minute - MINUTES + 1), minute + 1):
            self._counts[passed % MINUTES] = 0
        self._minute = max(self._minute, minute)
