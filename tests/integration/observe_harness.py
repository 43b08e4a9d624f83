"""A status to show, and a client that asks for it over HTTP on loopback."""

from __future__ import annotations

import base64
import http.client
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lightning_ppdl.records import MemberStatus
from lightning_ppdl.server.observe import ServiceStatus, StatusService
from lightning_ppdl.server.traffic import Traffic

HOSTILE = "<script>alert(1)</script>"
QUOTES = "a\"b'c\\n\n\\{}=,&amp;\u00b6"
NAMES = ("clinic-a", HOSTILE, QUOTES)
PASSWORD = "correct horse: b\u00e4ttery"


def some_status(names: tuple[str, ...] = NAMES) -> ServiceStatus:
    traffic = Traffic()
    for staleness in (0, 0, 1, 3, 200):
        traffic.upload(1000, staleness)
        traffic.download(4000)
    for seconds in (0.05, 2.0, 4000.0):
        traffic.waited(seconds)
    traffic.reject("MalformedUpdateError")
    traffic.reject("MalformedUpdateError")
    traffic.reject(HOSTILE)
    members = tuple(MemberStatus(name, at != 1, 10 + at, 2.5 * at) for at, name in enumerate(names))
    return ServiceStatus(
        protocol="round robin",
        merge="Add",
        study="0123456789abcdef",
        version=5,
        parameters=101_770,
        started_seconds_ago=3723.5,
        awaited=names[:2],
        members=members,
        traffic=traffic.snapshot(),
        journal_bytes=123_456,
        durable=True,
    )


@dataclass(frozen=True)
class Answer:
    code: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(service: StatusService, path: str, method: str = "GET", **headers: str) -> Answer:
    host, _, port = service.url.removeprefix("http://").rstrip("/").rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def address(service: StatusService) -> tuple[str, int]:
    return "127.0.0.1", int(service.url.rstrip("/").rpartition(":")[2])


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture(scope="module")
def service() -> Iterator[StatusService]:
    status = some_status()
    with StatusService(lambda: status) as running:
        yield running


class Page(HTMLParser):
    """What a browser would make of the page: its elements and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def ask_once(status: ServiceStatus, path: str = "/") -> Answer:
    with StatusService(lambda: status) as service:
        return ask(service, path)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
