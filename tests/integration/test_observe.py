"""The status page and the metrics, over HTTP on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import MemberStatus
from lightning_ppdl.server.observe import ServiceStatus, StatusService
from lightning_ppdl.server.observe.listener import MOST_CONNECTIONS
from lightning_ppdl.server.traffic import MINUTES, Traffic

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


@pytest.fixture
def service() -> Iterator[StatusService]:
    status = some_status()
    with StatusService(lambda: status) as running:
        yield running


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


def test_what_is_no_request_is_refused(service: StatusService) -> None:
    for garbage in (b"\x16\x03\x01\x00\xa5<b>\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n"):
        with socket.create_connection(address(service), timeout=20) as client:
            client.sendall(garbage)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert b"clinic-a" not in answer and b"<b>" not in answer
    assert ask(service, "/health").code == 200


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


def test_names_are_text_and_nothing_else(service: StatusService) -> None:
    page = Page(ask(service, "/").text)
    assert page.open == [], "every element is closed"
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    for name in NAMES:
        assert name in page.words
    harmless = Page(ask_once(some_status(("a", "b", "c"))).text)
    assert page.tags == harmless.tags, "names do not change the page's structure"


def ask_once(status: ServiceStatus, path: str = "/") -> Answer:
    with StatusService(lambda: status) as service:
        return ask(service, path)


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


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


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


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:9464", "LOCALHOST:80", "[::1]"])
def test_on_loopback_its_own_names_are_answered(service: StatusService, host: str) -> None:
    assert ask(service, "/", Host=host).code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "evil.example:127.0.0.1", ""],
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/health"])
def test_on_loopback_other_names_are_refused(service: StatusService, host: str, path: str) -> None:
    answer = ask(service, path, Host=host)
    assert answer.code == 403
    assert "clinic" not in answer.text and "evil" not in answer.text


def test_two_hosts_are_refused(service: StatusService) -> None:
    with socket.create_connection(address(service), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 403 " in client.recv(100)


def test_a_host_cut_off_at_the_bound_is_not_taken_for_ours(service: StatusService) -> None:
    """A web page chooses the length of what comes before its Host, and so where a bound would cut it."""
    end = b"\r\nHost: localhost"
    for shift in range(-2, 3):
        head = b"GET / HTTP/1.1\r\nA: " + b"a" * 60000 + b"\r\nB: "
        head += b"b" * (65536 + shift - len(head) - len(end)) + end + b".evil.example\r\n\r\n"
        with socket.create_connection(address(service), timeout=20) as client, contextlib.suppress(OSError):
            client.sendall(head)
            assert b" 200 " not in client.recv(100)


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/nothing"])
def test_with_a_password_nothing_is_shown_without_it(path: str) -> None:
    status = some_status()
    with StatusService(lambda: status, password=PASSWORD) as service:
        wrong = (basic("me", PASSWORD + "x"), basic("me", ""), basic(PASSWORD, "me"), "Basic ?", "Basic", "")
        for given in (*wrong, basic("me", PASSWORD).replace("Basic", "Bearer")):
            answer = ask(service, path, Authorization=given)
            assert answer.code == 401 and "clinic" not in answer.text
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        for user in ("me", "", "prometheus"):
            assert ask(service, path, Authorization=basic(user, PASSWORD)).code == (
                404 if path == "/nothing" else 200
            )
        assert ask(service, "/health").body == b"ok"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "status.example", "localhost.example"])
def test_beyond_loopback_a_password_is_needed(host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"host=.*password"):
        StatusService(some_status, host=host)
    StatusService(some_status, host=host, password=PASSWORD)


def test_beyond_loopback_every_name_and_no_stranger() -> None:
    status = some_status()
    with StatusService(lambda: status, host="0.0.0.0", password=PASSWORD) as service:
        assert ask(service, "/", Host="status.example").code == 401
        answer = ask(service, "/", Host="status.example", Authorization=basic("me", PASSWORD))
        assert answer.code == 200


def test_over_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with StatusService(some_status, host="::1") as service:
        assert service.url.startswith("http://[::1]:")
        assert ask(service, "/health").code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"password": ""}, "password="),
        ({"password": "short"}, "password="),
        ({"port": -1}, "port=-1"),
        ({"port": 65536}, "port=65536"),
        ({"port": True}, "port=True"),
        ({"host": ""}, "host=''"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        StatusService(some_status, **arguments)  # type: ignore[arg-type]
    assert "short" not in str(error.value), "a password is not repeated"


def test_a_port_that_is_taken(service: StatusService) -> None:
    port = address(service)[1]
    other = StatusService(some_status, port=port)
    with pytest.raises(ConfigurationError, match=f"port={port}.*free port"):
        other.start()
    other.stop()


def test_stop_frees_the_port_and_start_takes_it_again() -> None:
    service = StatusService(some_status)
    service.stop()
    for _ in range(3):
        service.start()
        service.start()
        where = address(service)
        silent = socket.create_connection(where, timeout=20)
        assert ask(service, "/health").code == 200
        began = time.monotonic()
        service.stop()
        service.stop()
        assert time.monotonic() - began < 5, "a silent client does not hold it up"
        with pytest.raises(ConfigurationError, match="start"):
            _ = service.url
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(where, timeout=20)
        silent.close()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(where)
    assert not [thread for thread in threading.enumerate() if thread.name == "ppdl-status"]


def test_silent_clients_hold_nobody_up(service: StatusService) -> None:
    """A dozen, then more than there are places: the next one is answered at once all the same."""
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for crowd in (12, 3 * MOST_CONNECTIONS):
            for number in range(crowd):
                client = stack.enter_context(socket.create_connection(address(service), timeout=20))
                if number % 2:
                    client.sendall(b"GET / HT")
            began = time.monotonic()
            assert ask(service, "/").code == 200
            assert time.monotonic() - began < 2
            assert threading.active_count() - before <= MOST_CONNECTIONS


def test_a_client_that_drips_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not make its connection last longer."""
    monkeypatch.setattr("lightning_ppdl.server.observe.listener.CONNECTION_SECONDS", 1.0)
    with StatusService(some_status) as service, socket.create_connection(address(service), 20) as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 15:
                client.sendall(b"a")
                client.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    if client.recv(100) == b"":
                        break
        assert 0.5 < time.monotonic() - began < 5


def test_many_at_once(service: StatusService) -> None:
    codes: list[int] = []

    def look() -> None:
        for path in ("/", "/metrics", "/status.json"):
            codes.append(ask(service, path).code)

    threads = [threading.Thread(target=look) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 30


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


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from lightning_ppdl.server.observe import StatusService\n"
        "try: StatusService(lambda: None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.stdout.startswith("ConfigurationError"), told.stderr
    assert "pip install 'lightning_ppdl[network]'" in told.stdout
