"""``ppdl serve`` as a process of its own, and participants that talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ppdl import wire
from lightning_ppdl.backends.grpc import Credentials, GrpcBackend
from lightning_ppdl.records import Manifest, Membership, ParameterSpec, Receipt, SparseUpdate, Vector

PPDL = Path(sys.executable).with_name("ppdl")
MANIFEST = Manifest(
    (ParameterSpec("layer.weight", (2, 3), "float32"), ParameterSpec("bias", (4,), "bfloat16"))
)
PATIENCE_SECONDS = 60.0


class Served:
    """A running server.

    Args:
        directory: Where it runs; its streams go to files beside it.
        arguments: Settings, over ports that are free.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        number = len(list(directory.parent.glob(f"{directory.name}-*.err")))
        self._out = directory.parent / f"{directory.name}-{number}.out"
        self._err = directory.parent / f"{directory.name}-{number}.err"
        environment = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "GRPC_VERBOSITY")}
        command: list[str | Path] = [
            PPDL,
            "serve",
            "address=127.0.0.1:0",
            "status.address=127.0.0.1:0",
            *arguments,
        ]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=directory, stdout=out, stderr=err, env=environment | {"OMP_NUM_THREADS": "1"}
            )
        wait_for(lambda: "status page" in self.banner or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        self.url = self._said(r"address +(\S+?),? ")
        self.page = self._said(r"status page +(\S+)")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def banner(self) -> str:
        return self._out.read_text()

    @property
    def log(self) -> str:
        return self._err.read_text()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The log, where it is of JSON lines."""
        return [json.loads(line) for line in self.log.splitlines()]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(10)

    def get(self, path: str, password: str | None = None) -> str:
        """What the status page answers."""
        request = urllib.request.Request(self.page + path)
        if password is not None:
            request.add_header("Authorization", f"Basic {password}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def _said(self, pattern: str) -> str:
        found = re.search(pattern, self.banner.replace("\n", " \n"))
        assert found, self.banner
        return found[1]


class Participant:
    """One that uploads the same value for every entry."""

    def __init__(self, url: str, name: str, credentials: Credentials | None = None) -> None:
        self.name = name
        self.backend = GrpcBackend(url, credentials)
        self.backend.patience_seconds = 20.0
        self.backend.tell = lambda said: None
        self.round = 0
        self.version = 0

    def join(self, initial: Vector | None = None, manifest: Manifest = MANIFEST) -> Membership:
        membership = self.backend.join(self.name, manifest)
        self.round, self.version = membership.last_round, membership.version
        if membership.needs_initial and initial is not None:
            assert self.backend.offer_initial(initial)
        return membership

    def upload(self, value: float = 1.0) -> Receipt:
        self.round += 1
        indices = np.arange(MANIFEST.size)
        values = np.full(MANIFEST.size, value, np.float32)
        update = SparseUpdate(self.name, self.round, self.version, indices, values)
        receipt = self.backend.upload(wire.encode_update(update, MANIFEST.size))
        self.version = receipt.version
        return receipt


def wait_for(ready: Callable[[], bool]) -> None:
    """Return once ``ready()``; fail after a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
