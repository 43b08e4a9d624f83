"""A participant's connection when the network, or the server, misbehaves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from grpc_harness import (
    MANIFEST,
    PATIENT_SECONDS,
    SIZE,
    encoded,
    eventually,
    in_background,
    serving,
    vector,
)
from proxy import Proxy

import lightning_ppdl.backends.grpc as client_module
from lightning_ppdl import errors, wire
from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.records import DownloadRequest
from lightning_ppdl.server.protocol import RoundRobin
from lightning_ppdl.server.state import StateDirectory


class Told(list[str]):
    """What a connection told; ``outages`` and ``ends`` of them."""

    @property
    def outages(self) -> int:
        return sum("trying again" in each for each in self)

    @property
    def ends(self) -> int:
        return sum("answers again" in each for each in self)


def joined(url: str, name: str = "anna", patience_seconds: float = PATIENT_SECONDS) -> tuple[Backend, Told]:
    backend, told = connect(url), Told()
    backend.patience_seconds, backend.tell = patience_seconds, told.append
    if backend.join(name, MANIFEST).needs_initial:
        backend.offer_initial(np.zeros(SIZE, np.float32))
    return backend, told


# Outages


@pytest.mark.parametrize("durable", [False, True])
def test_an_upload_whose_reply_is_lost_is_applied_once(durable: bool, tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state") if durable else None
    with serving(state=state) as served, Proxy(served.port) as proxy:
        anna, told = joined(proxy.url)
        other = served.member("ben")
        proxy.drop_replies = True
        with in_background(lambda: anna.upload(encoded())) as results:
            eventually(lambda: served.server.version == 1)
            other.upload(encoded("ben"))  # in between: the first receipt, not a new one
            proxy.cut()
            proxy.drop_replies = False
        assert results == [anna.upload(encoded())]
        assert getattr(results[0], "version", results) == 1
        assert served.server.version == served.server.status().uploads == 2
        assert served.server.parameters()[0] == 2.0
        assert (told.outages, told.ends, len(told)) == (1, 1, 2)


@pytest.mark.parametrize("method", ["join", "take_turn", "download", "end_turn", "status", "export"])
def test_every_request_survives_a_cut(method: str) -> None:
    with serving() as served, Proxy(served.port) as proxy:
        anna, told = joined(proxy.url)
        acts: dict[str, Any] = {
            "join": lambda: anna.join("anna", MANIFEST).last_round,
            "take_turn": lambda: anna.take_turn(5.0),
            "download": lambda: anna.download(DownloadRequest(1.0)),
            "end_turn": anna.end_turn,
            "status": lambda: anna.status().version,
            "export": lambda: anna.export()[1],
        }
        expected = acts[method]()
        proxy.drop_replies = True
        sent = proxy.request_bytes
        with in_background(acts[method]) as results:
            eventually(lambda: proxy.request_bytes > sent)
            proxy.cut()
            proxy.drop_replies = False
        assert results == [expected]
        assert (told.outages, told.ends, len(told)) == (1, 1, 2)


def test_a_long_transfer_that_breaks_in_the_middle_begins_anew() -> None:
    size = 2_000_000
    noise = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    with serving(initial=noise) as served, Proxy(served.port) as proxy:
        anna = connect(proxy.url)
        anna.patience_seconds = PATIENT_SECONDS
        anna.join("anna", vector(size))
        message = encoded(size=size, indices=range(size), values=noise)
        proxy.delay_seconds = 0.005
        acts: list[tuple[Callable[[], object], Callable[[], int]]] = [
            (lambda: anna.upload(message), lambda: proxy.request_bytes),
            (lambda: anna.download(DownloadRequest(1.0)), lambda: proxy.reply_bytes),
        ]
        for act, passed in acts:
            before = passed()
            with in_background(act) as results:
                eventually(lambda: passed() > before + 2_000_000)  # noqa: B023
                proxy.cut()
            assert results and not isinstance(results[0], Exception), results
        assert served.server.version == 1
        np.testing.assert_allclose(served.server.parameters(), 2 * noise, rtol=1e-6)


def test_a_server_that_restarts_is_invisible_but_for_time(tmp_path: Path) -> None:
    with serving(state=StateDirectory(tmp_path / "state"), protocol=RoundRobin()) as served:
        proxy = Proxy(served.port)
        anna, told = joined(proxy.url)
        anna.take_turn(5.0)
        anna.download(DownloadRequest(1.0))
        anna.upload(encoded())
        anna.take_turn(5.0)
        base = wire.decode_download(anna.download(DownloadRequest(1.0)), SIZE).version
        proxy.refuse = True
        proxy.cut()
    message = encoded(round_=2, base=base)
    with proxy, in_background(lambda: anna.upload(message)) as results:
        eventually(lambda: told.outages == 1)
        with serving(state=StateDirectory(tmp_path / "state"), protocol=RoundRobin()) as again:
            proxy.target = again.port
            proxy.refuse = False
            eventually(lambda: bool(results))
            assert getattr(results[0], "version", results) == 2
            assert again.server.parameters()[0] == 2.0
            anna.take_turn(5.0)
    assert (told.outages, told.ends) == (1, 1)


def test_a_server_that_was_made_anew_is_a_refusal_that_also_ends_the_outage() -> None:
    with serving() as served:
        proxy = Proxy(served.port)
        anna, told = joined(proxy.url)
        proxy.refuse = True
        proxy.cut()
    with serving() as other, proxy, in_background(lambda: anna.upload(encoded())) as results:
        eventually(lambda: told.outages == 1)
        proxy.target = other.port
        proxy.refuse = False
    assert isinstance(results[0], errors.SessionEndedError)
    assert (told.outages, told.ends) == (1, 1)


def test_patience_ends_and_its_pauses_grow_and_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as served, Proxy(served.port) as proxy:
        anna, told = joined(proxy.url, patience_seconds=60.0)
        proxy.refuse = True
        proxy.cut()
        now, runs = 0.0, []
        for _ in range(2):
            pauses: list[float] = []

            def sleep(seconds: float, pauses: list[float] = pauses) -> None:
                nonlocal now
                now += seconds
                pauses.append(seconds)

            monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
            with pytest.raises(errors.ServerUnavailableError, match="did not answer"):
                anna.upload(encoded())
            runs.append(pauses)
        for pauses in runs:
            assert sum(pauses) == pytest.approx(60.0)
            for number, pause in enumerate(pauses[:-1]):
                usual = min(10.0, 0.2 * 2**number)
                assert 0.5 * usual <= pause <= 1.5 * usual
        assert runs[0] != runs[1]
        assert (told.outages, told.ends) == (2, 0)


def test_a_refusal_is_never_sent_again() -> None:
    with serving() as served:
        anna, told = joined(served.url)
        for act in (
            lambda: anna.upload(encoded(indices=[SIZE])),
            lambda: anna.upload(encoded("ben")),
            lambda: anna.download(DownloadRequest(0.0)),
            lambda: anna.join(" ", MANIFEST),
            lambda: anna.join("anna", vector(3)),
        ):
            before = sum(served.server.status().rejections.values())
            with pytest.raises(errors.PPDLError):
                act()
            assert sum(served.server.status().rejections.values()) == before + 1
        assert told == []


@pytest.mark.parametrize("how", ["black_hole", "refuse"])
def test_a_sign_of_life_holds_training_up_no_longer_than_its_limit(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(client_module, "_SHORT_SECONDS", 0.5)
    with serving(protocol=RoundRobin()) as served, Proxy(served.port) as proxy:
        anna, told = joined(proxy.url)
        anna.take_turn(5.0)
        setattr(proxy, how, True)
        if how == "refuse":
            proxy.cut()
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(errors.ServerUnavailableError):
                anna.renew_turn()
            assert time.monotonic() - started < 3.0
        setattr(proxy, how, False)
        proxy.cut()
        eventually(lambda: _renewed(anna))
        assert told == []


def _renewed(backend: Backend) -> bool:
    try:
        backend.renew_turn()
    except errors.ServerUnavailableError:
        return False
    return True


def test_leaving_a_server_that_is_gone_takes_no_patience() -> None:
    with serving() as served, Proxy(served.port) as proxy:
        anna, _ = joined(proxy.url, patience_seconds=600.0)
        proxy.refuse = True
        proxy.cut()
        started = time.monotonic()
        anna.leave()
        anna.leave()
        assert time.monotonic() - started < 8.0
        with pytest.raises(errors.ServerClosedError, match=r"join\(\) first"):
            anna.upload(encoded())
        proxy.refuse = False
        assert anna.join("anna", MANIFEST).last_round == 0


# Processes


def test_worker_processes_beside_an_open_connection() -> None:
    """DataLoader's workers are forks of a process that talks to a server. Neither side may hang or crash."""
    script = """
import os, sys, warnings
import numpy as np, torch
from grpc_harness import MANIFEST, SIZE, encoded
from lightning_ppdl import connect
backend = connect(sys.argv[1])
backend.patience_seconds = 20.0
if backend.join("anna", MANIFEST).needs_initial:
    backend.offer_initial(np.zeros(SIZE, np.float32))
round_ = 0
for epoch in range(2):
    for batch in torch.utils.data.DataLoader(torch.arange(8), batch_size=2, num_workers=2):
        round_ += 1
        assert backend.upload(encoded(round_=round_, base=round_ - 1)).version == round_
for ends in (os._exit, sys.exit):
    child = os.fork()
    if not child:
        ends(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    round_ += 1
    assert backend.upload(encoded(round_=round_, base=round_ - 1)).version == round_
backend.leave()
print("rounds", round_)
"""
    with serving() as served:
        ran = subprocess.run(
            [sys.executable, "-c", script, served.url],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0 and ran.stdout.endswith("rounds 10\n"), ran.stderr
        assert dataclasses.astuple(served.server.status().members[0])[:3] == ("anna", False, 10)
