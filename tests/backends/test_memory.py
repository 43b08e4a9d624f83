"""``memory://``: the suite, and what is particular to servers found by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_harness import MANIFEST, SIZE, encoded
from backend_suite import BackendSuite

from lightning_ppdl import close, connect, errors, serve
from lightning_ppdl.backends import Backend
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.protocol import RoundRobin
from lightning_ppdl.server.state import StateDirectory

_numbers = itertools.count()


class TestMemory(BackendSuite):
    url = ""

    @pytest.fixture(autouse=True)
    def _close_after(self) -> Iterator[None]:
        self.url = ""
        yield
        if self.url:
            close(self.url)

    def make_server(self, **settings: Any) -> ParameterServer:
        self.url = f"memory://suite-{next(_numbers)}"
        return serve(self.url, ParameterServer(**settings))

    def connect(self) -> Backend:
        return connect(self.url)


class TestMemoryWithState(TestMemory):
    """The same, with every merge on the disk before it happens."""

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.path = tmp_path

    def make_server(self, **settings: Any) -> ParameterServer:
        return super().make_server(state=StateDirectory(self.path / f"state-{next(_numbers)}"), **settings)


@pytest.fixture
def url() -> Iterator[str]:
    address = f"memory://study-{next(_numbers)}"
    yield address
    close(address)


def join(url: str, name: str) -> Backend:
    backend = connect(url)
    if backend.join(name, MANIFEST).needs_initial:
        backend.offer_initial(np.zeros(SIZE, np.float32))
    return backend


def test_a_server_that_nobody_configured_is_asynchronous(url: str) -> None:
    anna, ben = join(url, "anna"), join(url, "ben")
    anna.upload(encoded("anna"))
    assert ben.upload(encoded("ben")).staleness == 1
    assert anna.status().awaited == () and anna.status().version == 2


def test_connecting_alone_makes_no_server(url: str) -> None:
    connect(url)
    server = ParameterServer(protocol=RoundRobin())
    assert serve(url, server) is server
    assert serve(url, server) is server


def test_a_name_in_use_is_not_taken_over(url: str) -> None:
    first = serve(url, ParameterServer())
    with pytest.raises(errors.ConfigurationError, match=rf"close\('{url}'\)"):
        serve(url, ParameterServer())
    first.close()
    second = serve(url, ParameterServer())
    assert connect(url).join("anna", MANIFEST).study == second.study


def test_closing_ends_the_collaboration_and_frees_the_name(url: str) -> None:
    anna = join(url, "anna")
    anna.upload(encoded("anna"))
    close(url)
    close(url)
    with pytest.raises(errors.ServerClosedError):
        anna.upload(encoded("anna", 2))
    anna.leave()
    again = anna.join("anna", MANIFEST)
    assert (again.version, again.last_round, again.needs_initial) == (0, 0, True)


def test_a_given_server_needs_no_name(url: str) -> None:
    server = ParameterServer()
    backend = MemoryBackend(url, server)
    assert backend.join("anna", MANIFEST).study == server.study
    assert connect(url).join("anna", MANIFEST).study != server.study


def test_how_to_wait_may_be_given(url: str) -> None:
    serve(url, ParameterServer(protocol=RoundRobin()))
    asked: list[tuple[bool, float]] = []

    def wait(ready: Any, timeout_seconds: float, expiry: Any) -> bool:
        asked.append((ready(), timeout_seconds))
        return bool(asked[-1][0])

    anna, ben = MemoryBackend(url, wait=wait), MemoryBackend(url, wait=wait)
    anna.join("anna", MANIFEST)
    ben.join("ben", MANIFEST)
    anna.take_turn(3.0)
    with pytest.raises(errors.TurnTimeoutError, match="waiting for 'anna'"):
        ben.take_turn(4.0)
    assert asked == [(True, 3.0), (False, 4.0)]


def test_a_connection_must_join_first(url: str) -> None:
    with pytest.raises(errors.ServerClosedError, match=r"join\(\) first"):
        connect(url).take_turn(1.0)


@pytest.mark.parametrize(
    "bad", ["memory://", "memory:study", "memory://study/part", "study", "", "ftp://x", "memory://[x", 5]
)
def test_bad_addresses_are_named(bad: Any) -> None:
    with pytest.raises(errors.ConfigurationError) as raised:
        connect(bad)
    assert repr(bad) in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"members": []}, "members=[]"),
        ({"members": ["anna", "anna"]}, "members=['anna', 'anna']"),
        ({"members": ["anna", ""]}, "members=''"),
        ({"upload_fraction": 0.0}, "upload_fraction=0.0"),
        ({"upload_fraction": float("nan")}, "upload_fraction=nan"),
        ({"bound": -1.0}, "bound=-1.0"),
        ({"lease_seconds": 0}, "lease_seconds=0"),
        ({"protocol": "round robin"}, "protocol='round robin'"),
        ({"merge": "add"}, "merge='add'"),
        ({"criterion": 0.9}, "criterion=0.9"),
        ({"protocol": RoundRobin}, "protocol=<class"),
    ],
)
def test_bad_server_arguments_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.ConfigurationError) as raised:
        ParameterServer(**settings)
    assert named in str(raised.value)
