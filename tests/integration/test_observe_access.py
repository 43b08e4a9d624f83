"""Who may see the status, and that nobody can hold the service up."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from observe_harness import (
    PASSWORD,
    address,
    ask,
    basic,
    service,
    some_status,
)

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server.observe import StatusService
from lightning_ppdl.server.observe.listener import MOST_CONNECTIONS

__all__ = ["service"]


def test_what_is_no_request_is_refused(service: StatusService) -> None:
    for garbage in (b"\x16\x03\x01\x00\xa5<b>\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n"):
        with socket.create_connection(address(service), timeout=20) as client:
            client.sendall(garbage)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert b"clinic-a" not in answer and b"<b>" not in answer
    assert ask(service, "/health").code == 200


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
    before = set(threading.enumerate())
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
        assert time.monotonic() - began < 1.5, "a silent client does not hold it up"
        with pytest.raises(ConfigurationError, match="start"):
            _ = service.url
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(where, timeout=20)
        silent.close()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(where)
    assert set(threading.enumerate()) <= before, "no thread is left"


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
