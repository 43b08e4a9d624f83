"""The book of what passed: totals, histograms, reasons, and the minutes of the last two hours."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest

from lightning_ppdl.server.traffic import MINUTES, Histogram, Traffic


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_nothing_passed() -> None:
    status = Traffic(Clock()).snapshot()
    assert (status.uploads, status.uploaded_bytes, status.downloads, status.downloaded_bytes) == (0, 0, 0, 0)
    assert status.rejections == ()
    assert status.uploads_per_minute == (0,) * MINUTES
    for histogram in (status.staleness, status.turn_wait_seconds):
        assert histogram.count == 0 and histogram.total == 0 and histogram.median_bucket is None
        assert len(histogram.counts) == len(histogram.bounds) + 1
        assert list(histogram.bounds) == sorted(set(histogram.bounds))


def test_totals() -> None:
    traffic = Traffic(Clock())
    traffic.upload(encoded_bytes=100, staleness=0)
    traffic.upload(encoded_bytes=50, staleness=3)
    traffic.download(encoded_bytes=7)
    status = traffic.snapshot()
    assert (status.uploads, status.uploaded_bytes, status.downloads, status.downloaded_bytes) == (
        2,
        150,
        1,
        7,
    )


@pytest.mark.parametrize(
    ("staleness", "bucket"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (64, 7), (65, 8), (128, 8), (129, 9), (10**9, 9)],
)
def test_a_bound_belongs_to_its_bucket(staleness: int, bucket: int) -> None:
    traffic = Traffic(Clock())
    traffic.upload(1, staleness)
    histogram = traffic.snapshot().staleness
    assert [at for at, number in enumerate(histogram.counts) if number] == [bucket]
    assert histogram.total == staleness


def test_waits_are_counted_in_seconds() -> None:
    traffic = Traffic(Clock())
    for seconds in (0.0, 0.1, 0.2, 59.0, 3600.0, 3600.1, -1e-9):
        traffic.waited(seconds)
    histogram = traffic.snapshot().turn_wait_seconds
    assert (histogram.bounds[0], histogram.bounds[-1]) == (0.1, 3600.0)
    assert histogram.counts[0] == 3 and histogram.counts[-1] == 1 and histogram.count == 7
    assert histogram.total == pytest.approx(0.1 + 0.2 + 59.0 + 3600.0 + 3600.1)


@pytest.mark.parametrize(
    ("counts", "median"),
    [((1, 0, 0), 0), ((1, 1, 0), 0), ((1, 2, 0), 1), ((0, 0, 5), 2), ((2, 0, 2), 0), ((0, 0, 0), None)],
)
def test_the_median_is_in_its_bucket(counts: tuple[int, ...], median: int | None) -> None:
    assert Histogram((1.0, 2.0), counts, 0.0).median_bucket == median


def test_reasons_are_bounded() -> None:
    traffic = Traffic(Clock())
    for number in range(1000):
        traffic.reject(f"Error{number}")
    traffic.reject("Error0")
    rejections = dict(traffic.snapshot().rejections)
    assert len(rejections) == 65
    assert rejections["Error0"] == 2 and rejections["Error63"] == 1
    assert rejections["other"] == 1000 - 64


def test_uploads_are_counted_minute_by_minute() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    traffic.upload(1, 0)
    clock.now += 59.9
    traffic.upload(1, 0)
    assert traffic.snapshot().uploads_per_minute[-2:] == (0, 2)
    clock.now += 0.2
    assert traffic.snapshot().uploads_per_minute[-2:] == (2, 0), "time passes without uploads too"
    traffic.upload(1, 0)
    clock.now += 60
    assert traffic.snapshot().uploads_per_minute[-4:] == (0, 2, 1, 0)


@pytest.mark.parametrize("minutes", [MINUTES - 1, MINUTES, MINUTES + 1, 10 * MINUTES + 7, 60 * 24 * 365 * 10])
def test_a_long_silence(minutes: int) -> None:
    clock = Clock()
    traffic = Traffic(clock)
    traffic.upload(1, 0)
    clock.now += 60 * minutes
    traffic.upload(1, 0)
    traffic.upload(1, 0)
    per_minute = traffic.snapshot().uploads_per_minute
    assert len(per_minute) == MINUTES and per_minute[-1] == 2
    assert per_minute[0] == (1 if minutes == MINUTES - 1 else 0) and sum(per_minute[1:-1]) == 0


def test_the_ring_agrees_with_a_plain_count() -> None:
    clock, rng = Clock(), random.Random(0)
    traffic = Traffic(clock)
    began, uploads = clock.now, Counter[int]()
    for _ in range(3000):
        clock.now += rng.choice([0.0, 1.0, 20.0, 61.0, 500.0, rng.uniform(0, 20_000)])
        traffic.upload(1, 0)
        minute = int((clock.now - began) // 60)
        uploads[minute] += 1
        expected = tuple(uploads[at] for at in range(minute - MINUTES + 1, minute + 1))
        assert traffic.snapshot().uploads_per_minute == expected


def test_a_clock_that_stands_or_steps_back_loses_nothing() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    clock.now += 600
    traffic.upload(1, 0)
    clock.now -= 300
    traffic.upload(1, 0)
    assert traffic.snapshot().uploads_per_minute[-1] == 2


def test_a_snapshot_stays_as_it_was() -> None:
    traffic = Traffic(Clock())
    before = traffic.snapshot()
    traffic.upload(1, 0)
    traffic.reject("MalformedUpdateError")
    assert before.uploads == 0 and before.rejections == () and before.staleness.count == 0
    assert sum(before.uploads_per_minute) == 0


def test_memory_does_not_grow() -> None:
    clock = Clock()
    traffic = Traffic(clock)

    def pass_some(number: int) -> None:
        for at in range(number):
            clock.now += 7
            traffic.upload(40_000, at % 300)
            traffic.download(160_000)
            traffic.waited(at % 5000)
            traffic.reject(f"reason {at % 100}")

    pass_some(2000)
    tracemalloc.start()
    try:
        pass_some(20_000)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown < 20_000, "bytes, for 80,000 entries"
