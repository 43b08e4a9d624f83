"""What ``ppdl serve``, ``status`` and ``export`` refuse in one breath; their help and their settings."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_cli import Ppdl, ppdl

import lightning_ppdl
from lightning_ppdl.config import LimitsConfig
from lightning_ppdl.keys import make_keys
from lightning_ppdl.server.security import Limits

__all__ = ["ppdl"]  # a fixture: used by name

CONF = Path(lightning_ppdl.__file__).parent / "conf" / "ppdl"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Commands that run in this process set it for good.
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(directory, ["localhost", "127.0.0.1"], ["clinic-a"], 30)
    return directory


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["address=50051"], ["address='50051'", "HOST:PORT"]),
        (["address=[::1]:x"], ["address='[::1]:x'", "HOST:PORT"]),
        (["address=127.0.0.1:99999"], ["address='127.0.0.1:99999'"]),
        (["adress=127.0.0.1:1"], ["did you mean address?"]),
        (["+limits.max_request=3"], ["limits.max_request", "did you mean limits.max_requests?"]),
        (["members=clinic-a"], ["write members=[clinic-a]"]),
        (["members=[]"], ["members"]),
        (["members=[clinic-a,clinic-a]"], ["members"]),
        (["max_members=0"], ["max_members=0", "1 or more"]),
        (["lease_seconds=0"], ["lease_seconds=0", "above 0"]),
        (["upload.fraction=7"], ["upload.fraction=7", "(0, 1]"]),
        (["upload.bound=-1"], ["upload.bound=-1", "above 0"]),
        (["limits.max_transfers=0"], ["serve: limits.max_transfers=0", "1 or more"]),
        (["initial=nowhere.safetensors"], ["initial='nowhere.safetensors'", "cannot be read"]),
        (["protocol=chaos"], ["protocol/chaos", "round_robin"]),
        (["protocol=synchronous", "protocol.quorum=3", "members=[a,b]"], ["quorum=3", "2 members"]),
        (["merge=staleness_weighted", "merge.exponent=-1"], ["merge.exponent=-1"]),
        (["tls.certificate=KEYS/server.pem"], ["tls.certificate=", "tls.key=None", "TLS needs both"]),
        (["tls.client_ca=KEYS/ca.pem"], ["tls.client_ca=", "need TLS"]),
        (["tls.certificate=no.pem", "tls.key=no.pem"], ["tls.certificate='no.pem' cannot be read"]),
        (
            ["tokens=KEYS/tokens.txt", "address=0.0.0.0:0"],
            ["tokens=", "without TLS", "allow_plaintext_tokens"],
        ),
        (["tokens=KEYS/ca.pem"], ["ca.pem, line 1"]),
        (["status.address=0.0.0.0:0"], ["status.address='0.0.0.0:0'", "status.password_file"]),
        (["status.address=here"], ["status.address='here'", "HOST:PORT"]),
        (["status.password_file=none"], ["status.password_file='none' cannot be read"]),
        (["status.password_file=short"], ["status.password_file='short'", "8 characters"]),
        (["state=short"], ["state='short'", "directory"]),
        (["log=xml"], ["log='xml'", "text, json"]),
        (["log_level=LOUD"], ["log_level='LOUD'", "DEBUG"]),
        (["address=127.0.0.1:BUSY"], ["address='127.0.0.1:", "cannot be served"]),
        (["status.address=127.0.0.1:BUSY"], ["status.address='127.0.0.1:", "in use", "status.address=null"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_serve_refuses_in_one_breath(
    ppdl: Ppdl,
    capfd: pytest.CaptureFixture[str],
    keys: Path,
    tmp_path: Path,
    arguments: list[str],
    expected: list[str],
) -> None:
    (tmp_path / "short").write_text("1234567")
    (tmp_path / "short").chmod(0o600)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        given = [argument.replace("KEYS", str(keys)).replace("BUSY", port) for argument in arguments]
        assert ppdl("serve", "address=127.0.0.1:0", "status.address=127.0.0.1:0", *given) == 2
    out, err = capfd.readouterr()
    # gRPC was in this process before the command could quiet it.
    said = [line for line in err.splitlines() if "add_port.cc" not in line]
    assert out == "" and said[0].startswith("ppdl serve: ") and "Traceback" not in err
    for part in expected:
        assert part in err
    assert not (tmp_path / "outputs").exists()
    assert not [one for one in set(threading.enumerate()) - before if one.name.startswith("ppdl-")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["status"], ["give the server's address", "grpc://HOST:PORT"]),
        (["status", "localhost:50051"], ["server='localhost:50051'", "memory, grpc, grpcs"]),
        (["status", "memory://study"], ["memory://study", "own process"]),
        (["status", "grpc://127.0.0.1:1", "timeout_seconds=0"], ["timeout_seconds=0", "above 0"]),
        (["status", "grpcs://127.0.0.1:1", "ca=none"], ["ca='none' cannot be read"]),
        (["status", "grpc://127.0.0.1:1?caa=x"], ["'caa'"]),
        (["status", "grpc://127.0.0.1:1", "tocken_file=x"], ["did you mean token_file?"]),
        (["export", "grpc://127.0.0.1:1"], ["give the file"]),
        (["export", "grpc://127.0.0.1:1", "model.pt"], ["file='model.pt'", ".safetensors"]),
        (["export", "grpc://127.0.0.1:1", "a/b.safetensors"], ["there is no directory a"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_status_and_export_refuse_in_one_line(
    ppdl: Ppdl, capfd: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    assert ppdl(*arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"ppdl {arguments[0]}: ") and len(err.splitlines()) == 1
    for part in expected:
        assert part in err


@pytest.mark.parametrize(("command", "listens"), [("status", False), ("status", True), ("export", True)])
def test_an_unreachable_server_is_one_line_within_the_timeout(
    ppdl: Ppdl, capfd: pytest.CaptureFixture[str], command: str, listens: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        if not listens:
            silent.close()
        started = time.monotonic()
        assert (
            ppdl(command, url, *(["x.safetensors"] if command == "export" else []), "timeout_seconds=1") == 1
        )
        assert time.monotonic() - started < 4
    err = capfd.readouterr().err
    assert err.startswith(f"ppdl {command}: '{url}' did not answer") and len(err.splitlines()) == 1


def test_the_limits_are_those_of_the_service() -> None:
    shown = OmegaConf.load(CONF / "serve.yaml").limits
    assert dict(shown) == asdict(Limits())
    assert {field.name for field in fields(LimitsConfig)} == set(shown)


def test_every_setting_is_documented_with_its_default() -> None:
    table = (Path(__file__).parents[2] / "docs" / "serving.md").read_text().partition("## Settings")[2]

    def leaves(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", "null" if value is None else str(value)

    loaded: Any = OmegaConf.to_container(OmegaConf.load(CONF / "serve.yaml"))
    settings = dict(leaves({k: v for k, v in loaded.items() if k not in ("defaults", "hydra")}, ""))
    assert len(settings) > 20
    for key, value in settings.items():
        row = next(line for line in table.splitlines() if f"`{key}`" in line)
        assert row.split("|")[2].strip().strip("`").lower() == value.lower(), key


@pytest.mark.parametrize("command", ["serve", "status", "export"])
def test_help_shows_settings_and_examples(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert ppdl(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"ppdl {command} " in out and "Examples:" in out and "schema" not in out
    assert ("lease_seconds: 60.0" if command == "serve" else "timeout_seconds: 10.0") in out
