"""The status as Prometheus metrics, in its text format. The one file that needs ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server.observe.status import ServiceStatus
from lightning_ppdl.server.traffic import Histogram

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigurationError(
        "the status page and the metrics need the package prometheus_client: pip install "
        "'lightning_ppdl[network]'"
    ) from error

CONTENT_TYPE = CONTENT_TYPE_LATEST

MOST_MEMBERS = 1000
"""Every participant is a time series that Prometheus keeps for weeks; more than these get none."""


def exposition(status: ServiceStatus) -> bytes:
    """The text that ``/metrics`` answers with.

    The registry is made for this one text, so nothing is shared with other metrics of the process.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(status))
    return generate_latest(registry)


class _Snapshot(Collector):
    """Yields the metrics of one status."""

    def __init__(self, status: ServiceStatus) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """None: the registry is asked once, and need not compare names with those of others."""
        return []

    def collect(self) -> Iterable[Metric]:
        yield from self._totals()
        yield from self._state()
        yield from self._members()

    def _totals(self) -> Iterable[Metric]:
        traffic = self._status.traffic
        for name, text, value in (
            ("uploads", "Uploads accepted since the server started.", traffic.uploads),
            ("uploaded_bytes", "Size of accepted uploads as encoded, in bytes.", traffic.uploaded_bytes),
            ("downloads", "Downloads served since the server started.", traffic.downloads),
            ("downloaded_bytes", "Size of served downloads as encoded, in bytes.", traffic.downloaded_bytes),
        ):
            yield CounterMetricFamily(f"ppdl_{name}", text, value=value)
        yield _histogram(
            "upload_staleness",
            "Updates of others merged between an upload's download and the upload, a count.",
            traffic.staleness,
        )
        yield _histogram(
            "turn_wait_seconds",
            "Time waited for a turn, in seconds.",
            traffic.turn_wait_seconds,
        )
        rejections = CounterMetricFamily(
            "ppdl_rejections", "Requests refused, by the class of the error.", labels=["reason"]
        )
        for reason, count in traffic.rejections:
            rejections.add_metric([reason], count)
        yield rejections

    def _state(self) -> Iterable[Metric]:
        status = self._status
        for name, text, value in (
            ("version", "Version of the shared parameters: the number of merges.", status.version),
            ("parameters", "Entries of the shared vector; 0 before the first join.", status.parameters),
            ("uptime_seconds", "Time since the server started, in seconds.", status.started_seconds_ago),
        ):
            yield GaugeMetricFamily(f"ppdl_{name}", text, value=value)
        if status.journal_bytes is not None:
            yield GaugeMetricFamily(
                "ppdl_journal_bytes", "Size of the journal on disk, in bytes.", value=status.journal_bytes
            )

    def _members(self) -> Iterable[Metric]:
        status = self._status
        counts = GaugeMetricFamily("ppdl_members", "Participants that ever joined.", labels=["present"])
        here = sum(member.present for member in status.members)
        counts.add_metric(["true"], here)
        counts.add_metric(["false"], len(status.members) - here)
        rounds = CounterMetricFamily(
            "ppdl_member_rounds", "The participant's rounds that were accepted.", labels=["participant"]
        )
        idle = GaugeMetricFamily(
            "ppdl_member_idle_seconds",
            "Time since it was heard, in seconds.",
            labels=["participant"],
        )
        # If there are too many, those that are here matter most.
        for member in sorted(status.members, key=lambda member: not member.present)[:MOST_MEMBERS]:
            rounds.add_metric([member.name], member.rounds)
            idle.add_metric([member.name], member.idle_seconds)
        awaited = GaugeMetricFamily(
            "ppdl_awaited", "1 for each participant that others are waiting for.", labels=["participant"]
        )
        for name in status.awaited[:MOST_MEMBERS]:
            awaited.add_metric([name], 1)
        yield from (counts, rounds, idle, awaited)


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    bounds = [*(f"{bound}" for bound in histogram.bounds), "+Inf"]
    return HistogramMetricFamily(
        f"ppdl_{name}",
        text,
        buckets=list(zip(bounds, histogram.cumulative)),
        sum_value=histogram.total,
    )
