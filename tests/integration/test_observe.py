"""What the status page, the metrics and the JSON show, over HTTP on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace

import pytest
from observe_harness import (
    HOSTILE,
    NAMES,
    Page,
    ask,
    ask_once,
    samples,
    service,
    some_status,
)
from prometheus_client.parser import text_string_to_metric_families

from lightning_ppdl.records import MemberStatus
from lightning_ppdl.server.observe import ServiceStatus, StatusService
from lightning_ppdl.server.traffic import MINUTES, Traffic

__all__ = ["service"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/?from=bookmark", "text/html; charset=utf-8"),
        ("/metrics", "text/plain; version="),
        ("/status.json", "application/json"),
        ("/health", "text/plain; charset=utf-8"),
    ],
)
def test_each_route(service: StatusService, path: str, kind: str) -> None:
    answer = ask(service, path)
    assert answer.code == 200
    assert answer.headers["Content-Type"].startswith(kind)
    head = ask(service, path, method="HEAD")
    assert head.code == 200 and head.body == b""
    assert head.headers["Content-Length"] == str(len(answer.body))


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/health", "/nothing"])
def test_headers_keep_the_answer_where_it_belongs(service: StatusService, path: str) -> None:
    headers = ask(service, path).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "script" not in policy
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/metrics/", "/index.html", "/../", "/%2e%2e/etc/passwd", "//", "/status.json/x"]
)
def test_nothing_else_is_there(service: StatusService, path: str) -> None:
    answer = ask(service, path)
    assert answer.code == 404 or (path == "//" and answer.code == 200)
    assert "etc" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "NONE"])
def test_only_get_and_head(service: StatusService, method: str) -> None:
    answer = ask(service, "/", method=method)
    assert answer.code == 405 and answer.headers["Allow"] == "GET, HEAD"
    assert "clinic-a" not in answer.text


def test_health_tells_nothing(service: StatusService) -> None:
    assert ask(service, "/health").body == b"ok"


def test_names_are_text_and_nothing_else(service: StatusService) -> None:
    page = Page(ask(service, "/").text)
    assert page.open == [], "every element is closed"
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    for name in NAMES:
        assert name in page.words
    harmless = Page(ask_once(some_status(("a", "b", "c"))).text)
    assert page.tags == harmless.tags, "names do not change the page's structure"


def test_the_page_says_what_matters(service: StatusService) -> None:
    text = " ".join(Page(ask(service, "/").text).words)
    for words in ("01234567", "round robin", "Add", "101,770", "1 hour 2 minutes", "Awaiting 2 participants"):
        assert words in text
    for words in (
        "2 of 3 present",
        "5.00 kB",
        "20.0 kB",
        "malformed",
        "123 kB",
        "No parameter value is shown",
    ):
        assert words in text
    assert "0123456789abcdef" not in text


def test_the_page_loads_nothing(service: StatusService) -> None:
    text = ask(service, "/").text
    links = [value or "" for name, value in Page(text).attributes if name in ("src", "href", "action")]
    assert all(link.startswith(("data:", "/")) for link in links) and links
    assert "url(" not in text and "@import" not in text and 'http-equiv="refresh"' in text


def test_the_style_is_the_one_that_the_policy_lets_in(service: StatusService) -> None:
    answer = ask(service, "/")
    style = answer.text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"awaited": (), "members": ()}, "Nobody has joined yet"),
        ({"awaited": ()}, "Nobody is awaited"),
        ({"awaited": ("clinic-z",), "members": ()}, "not joined yet"),
        ({"awaited": (), "members": (MemberStatus("clinic-a", False, 3, 90.0),)}, "Everybody is away"),
        ({"journal_bytes": None, "durable": False}, "in memory only"),
        ({"traffic": Traffic().snapshot()}, "No uploads yet"),
        ({"parameters": 0, "version": 0, "started_seconds_ago": 0.0}, "Parameters"),
        ({"awaited": tuple(f"clinic-{at}" for at in range(30))}, "and 22 more"),
        ({"members": tuple(MemberStatus(f"c{at}", True, 0, 0.0) for at in range(700))}, "and 200 more"),
    ],
)
def test_the_page_in_every_state(change: dict[str, object], words: str) -> None:
    page = Page(ask_once(replace(some_status(), **change)).text)  # type: ignore[arg-type]
    assert page.open == [] and words in " ".join(page.words)


def test_metrics_equal_the_snapshot(service: StatusService) -> None:
    status = some_status()
    found = samples(ask(service, "/metrics").text)

    def one(name: str, **labels: str) -> float:
        return found.pop((f"ppdl_{name}", tuple(sorted(labels.items()))))

    traffic = status.traffic
    assert one("uploads_total") == 5 and one("uploaded_bytes_total") == 5000
    assert one("downloads_total") == 5 and one("downloaded_bytes_total") == 20_000
    assert one("version") == 5 and one("parameters") == 101_770
    assert one("uptime_seconds") == 3723.5 and one("journal_bytes") == 123_456
    assert one("members", present="true") == 2 and one("members", present="false") == 1
    for member in status.members:
        assert one("member_rounds_total", participant=member.name) == member.rounds
        assert one("member_idle_seconds", participant=member.name) == member.idle_seconds
    for name in status.awaited:
        assert one("awaited", participant=name) == 1
    assert one("rejections_total", reason="MalformedUpdateError") == 2
    assert one("rejections_total", reason=HOSTILE) == 1
    for name, histogram in (
        ("upload_staleness", traffic.staleness),
        ("turn_wait_seconds", traffic.turn_wait_seconds),
    ):
        for bound, count in zip(histogram.bounds, histogram.cumulative):
            assert one(f"{name}_bucket", le=str(bound)) == count
        assert one(f"{name}_bucket", le="+Inf") == one(f"{name}_count") == histogram.count
        assert one(f"{name}_sum") == histogram.total
    assert found == {}, "no other metric, e.g. of the process"


def test_metrics_say_what_they_are(service: StatusService) -> None:
    for family in text_string_to_metric_families(ask(service, "/metrics").text):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        unit = family.name.rpartition("_")[2]
        if unit in ("bytes", "seconds"):
            assert f"in {unit}" in family.documentation


def test_metrics_are_bounded_and_leave_out_who_is_away() -> None:
    members = tuple(MemberStatus(f"c{at}", at >= 500, 1, 0.0) for at in range(1500))
    text = ask_once(replace(some_status(), members=members, journal_bytes=None), "/metrics").text
    found = samples(text)
    names = {dict(labels)["participant"] for name, labels in found if name == "ppdl_member_rounds_total"}
    assert names == {f"c{at}" for at in range(500, 1500)}
    assert found[("ppdl_members", (("present", "false"),))] == 500
    assert "journal" not in text


def test_json_is_the_status(service: StatusService) -> None:
    status = some_status()
    told = json.loads(ask(service, "/status.json").text)
    assert told["members"][1] == {"name": HOSTILE, "present": False, "rounds": 11, "idle_seconds": 2.5}
    assert told["traffic"]["rejections"] == {"MalformedUpdateError": 2, HOSTILE: 1}
    assert told["traffic"]["staleness"]["counts"] == list(status.traffic.staleness.counts)
    assert len(told["traffic"]["uploads_per_minute"]) == MINUTES
    assert set(told) == {*status.__dataclass_fields__}


def test_a_status_that_fails_is_an_error_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> ServiceStatus:
        raise RuntimeError("clinic-a has a secret")

    with StatusService(broken) as service:
        answer = ask(service, "/")
        assert answer.code == 500 and "clinic-a" not in answer.text
        assert ask(service, "/health").code == 200
    assert "clinic-a has a secret" in caplog.text


def test_each_answer_is_of_its_moment() -> None:
    statuses = [some_status()]
    with StatusService(lambda: statuses[-1]) as service:
        statuses.append(replace(some_status(), version=77))
        assert json.loads(ask(service, "/status.json").text)["version"] == 77
