"""``ppdl serve`` as a process, and ``ppdl status`` and ``ppdl export`` against it."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from serve_harness import MANIFEST, Participant, Served, wait_for
from test_cli import Ppdl, ppdl

from lightning_ppdl.backends.grpc import Credentials
from lightning_ppdl.errors import AuthenticationError
from lightning_ppdl.keys import make_keys
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.server.core import ParameterServer

__all__ = ["ppdl"]  # a fixture: used by name

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two members in turn, who need prove nothing; it logs everything, as JSON."""
    with Served(
        tmp_path_factory.mktemp("open") / "run",
        "members=[clinic-a,clinic-b]",
        "protocol=round_robin",
        "lease_seconds=1",
        "log=json",
        "log_level=debug",
    ) as served:
        yield served


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(directory, ["localhost", "127.0.0.1"], ["clinic-a", "clinic-b"], 30)
    return directory


@pytest.fixture(scope="module")
def safe_server(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[Served]:
    """TLS, certificates and tokens; on all addresses, with a password before the status page."""
    directory = tmp_path_factory.mktemp("safe") / "run"
    directory.mkdir()
    password = directory.parent / "password"
    password.write_text(f"{PASSWORD}\n")
    password.chmod(0o600)
    with Served(
        directory,
        "state=null",
        "address=0.0.0.0:0",
        "status.address=0.0.0.0:0",
        f"status.password_file={password}",
        f"tls.certificate={keys / 'server.pem'}",
        f"tls.key={keys / 'server-key.pem'}",
        f"tls.client_ca={keys / 'ca.pem'}",
        f"tokens={keys / 'tokens.txt'}",
        "log=json",
    ) as served:
        yield served


def proofs(keys: Path, name: str, token_of: str | None = None) -> Credentials:
    return Credentials(
        keys / "ca.pem", keys / f"{name}.pem", keys / f"{name}-key.pem", keys / f"{token_of or name}.token"
    )


def settings(credentials: Credentials) -> list[str]:
    return [f"{name}={getattr(credentials, name)}" for name in ("ca", "certificate", "key", "token_file")]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Commands that run in this process set it for good.
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")


# A server's life


def test_a_collaboration_outlives_its_server(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", ["merge=add", "lease_seconds=30"]
    with Served(run, *settings) as server:
        assert f"state        {run / 'ppdl-state'}: new" in server.banner
        assert "Asynchronous, merging by Add" in server.banner
        assert "anybody, without proof of the name" in server.banner
        anna, bert = Participant(server.url, "clinic-a"), Participant(server.url, "clinic-b")
        assert anna.join(np.zeros(MANIFEST.size, np.float32)).needs_initial
        study = bert.join().study
        assert (anna.upload().version, bert.upload().version) == (1, 2)
        started = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - started < 5
        assert "participant 'clinic-a' joined, after round 0" in server.log
        assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO +SIGTERM: ", server.log, re.MULTILINE)
        assert "ended at version 2" in server.log and "Traceback" not in server.log
        same_address = f"address={server.url.removeprefix('grpc://')}"

    with Served(run, *settings, same_address) as server:
        assert "goes on from version 2, 2 members" in server.banner
        assert anna.upload().version == 3, "the session that it had goes on, too"
        assert server.end(signal.SIGKILL) == -signal.SIGKILL

    with Served(run, *settings, same_address) as server:
        assert "goes on from version 3, 2 members" in server.banner
        membership = anna.join()
        assert (membership.last_round, membership.version, membership.study) == (2, 3, study)
        assert [member.rounds for member in bert.backend.status().members] == [2, 1]
        bert.version = 3
        assert (bert.upload().staleness, bert.round) == (0, 2)
        assert server.end(signal.SIGINT) == 0
        assert "SIGINT: answering" in server.log
    assert {path.name for path in run.iterdir()} == {"ppdl-state"}, "nothing but the state"


def test_the_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import sys, time\nfrom lightning_ppdl.cli.stopping import Stop\n"
        "with Stop() as stop:\n    print('ready', flush=True)\n    print(stop.wait(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT
    process.stdout.close()


# What it shows


def test_whoever_falls_silent_loses_its_turn_and_the_log_says_so(open_server: Served) -> None:
    assert "clinic-a, clinic-b, without proof of the name" in open_server.banner
    anna, bert = Participant(open_server.url, "clinic-a"), Participant(open_server.url, "clinic-b")
    anna.join(np.zeros(MANIFEST.size, np.float32))
    bert.join()
    anna.backend.take_turn(10)  # and is heard of no more
    bert.backend.take_turn(20)
    (lost,) = [entry for entry in open_server.entries if entry.get("event") == "turn_lost"]
    assert (lost["participant"], lost["seconds"], lost["held"]) == ("clinic-a", 1.0, True)
    assert lost["level"] == "WARNING"
    assert lost["message"] == "participant 'clinic-a' gave no sign of life for 1 seconds and lost its turn"
    bert.upload()
    (upload,) = [entry for entry in open_server.entries if entry.get("event") == "upload"]
    assert {"participant": "clinic-b", "round": 1, "version": 1, "staleness": 0}.items() <= upload.items()
    assert upload["level"] == "DEBUG" and 0 < upload["bytes"] < 200
    bert.backend.leave()
    wait_for(lambda: any(entry.get("event") == "left" for entry in open_server.entries))
    joined = [entry["participant"] for entry in open_server.entries if entry.get("event") == "joined"]
    assert joined == ["clinic-a", "clinic-b"]
    for entry in open_server.entries:
        assert datetime.fromisoformat(entry["time"].replace("Z", "+00:00")).utcoffset() is not None
        assert entry["logger"].startswith("lightning_ppdl.")


def test_the_page_and_the_metrics_show_the_members(open_server: Served) -> None:
    Participant(open_server.url, "clinic-a").join(np.zeros(MANIFEST.size, np.float32))
    page = open_server.get("")
    assert "clinic-a" in page
    assert re.search(r"^ppdl_\w*version\S* \d", open_server.get("metrics"), re.MULTILINE)
    assert json.loads(open_server.get("status.json"))["durable"] is True
    assert open_server.get("health").strip() == "ok"


def test_status_shows_the_server_at_a_glance(
    ppdl: Ppdl, open_server: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Participant(open_server.url, "clinic-a").join(np.zeros(MANIFEST.size, np.float32))
    assert ppdl("status", open_server.url) == 0
    out = capsys.readouterr().out
    assert open_server.url in out and "10 shared parameters" in out
    assert re.search(r"clinic-a .* present .* 0 .* just now", out)
    assert ppdl("status", open_server.url, "json=true") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"] == 10 and "clinic-a" in [member["name"] for member in shown["members"]]
    assert list(tmp_path.iterdir()) == [], "no run directory, no log"


def test_a_second_server_on_the_same_state_is_refused(
    ppdl: Ppdl, open_server: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    state = f"state={open_server.directory / 'ppdl-state'}"
    assert ppdl("serve", "address=127.0.0.1:0", "status.address=null", state) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ppdl serve: the state ") and len(err.splitlines()) == 1
    assert f"is in use by process {open_server.process.pid}" in err and "another directory" in err
    assert open_server.process.poll() is None


# TLS, and what is exported


def test_export_gives_a_file_that_the_module_loads_and_a_server_starts_from(
    ppdl: Ppdl, safe_server: Served, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(r"address +grpcs://127\.0\.0\.1:\d+, from other machines grpcs://", safe_server.banner)
    assert "encryption   TLS" in safe_server.banner and "in memory alone" in safe_server.banner
    assert "anybody, with a certificate and a token to prove the name" in safe_server.banner
    credentials = proofs(keys, "clinic-a")
    asked = ["export", safe_server.url, "model.safetensors", *settings(credentials)]
    module = torch.nn.Module()
    module.layer = torch.nn.Linear(3, 2, bias=False)
    module.bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    layout = ParameterLayout(module)
    assert {spec.name for spec in layout.specs} == {spec.name for spec in MANIFEST.parameters}
    layout_specs = type(MANIFEST)(layout.specs)
    anna = Participant(safe_server.url, "clinic-a", credentials)

    assert ppdl(*asked) == 2
    assert "has no parameters yet" in capsys.readouterr().err
    initial = (np.arange(layout.size) / 8).astype(np.float32)
    assert anna.join(initial, layout_specs).needs_initial
    anna.upload(0.5)
    assert ppdl(*asked) == 0
    out = capsys.readouterr().out
    assert "model.safetensors: version 1, 10 parameters in 2 tensors" in out
    assert "the participants' releases, nothing else" in out and "docs/privacy.md" in out

    file = tmp_path / "model.safetensors"
    missing, unexpected = module.load_state_dict(load_file(file), strict=False)
    assert not missing and not unexpected
    np.testing.assert_array_equal(layout.flatten().numpy(), initial + 0.5)
    assert load_file(file)["bias"].dtype == torch.bfloat16
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["version"] == "1" and metadata["fingerprint"] == layout_specs.fingerprint
    other = ParameterServer(initial=file)
    assert not other.join("clinic-b", layout_specs).needs_initial
    np.testing.assert_array_equal(other.parameters(), initial + 0.5)

    assert ppdl(*asked) == 2
    assert "is there already" in capsys.readouterr().err
    anna.upload(0.5)
    assert ppdl(*asked, "overwrite=true") == 0
    module.load_state_dict(load_file(file), strict=False)
    np.testing.assert_array_equal(layout.flatten().numpy(), initial + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_status_over_tls_needs_the_proofs(
    ppdl: Ppdl, safe_server: Served, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl("status", safe_server.url, *settings(proofs(keys, "clinic-b"))) == 0
    assert safe_server.url in capsys.readouterr().out
    unknown = settings(proofs(keys, "clinic-b"))[:-1]
    assert ppdl("status", safe_server.url, *unknown) == 2
    assert "no token" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
    assert ppdl("status", safe_server.url, f"ca={keys / 'ca.pem'}", "timeout_seconds=1") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert ppdl("status", safe_server.url.replace("grpcs", "grpc"), "timeout_seconds=1") == 1
    assert "begins with grpcs:// if it has TLS" in capsys.readouterr().err
    with pytest.raises(AuthenticationError):
        Participant(safe_server.url, "clinic-a", proofs(keys, "clinic-b")).join()
    for line in safe_server.log.splitlines():
        json.loads(line)  # failed handshakes and all


def test_the_page_asks_for_its_password(safe_server: Served) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        safe_server.get("")
    assert "clinic" in safe_server.get("metrics", base64.b64encode(f"x:{PASSWORD}".encode()).decode())
