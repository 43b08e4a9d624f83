"""``ppdl join`` as a process of its own."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PPDL = Path(sys.executable).with_name("ppdl")
LIMIT_SECONDS = 180.0


class Joined:
    """A running participant.

    Args:
        directory: Where it runs; what it prints goes to a file there.
        server: The address.
        name: Its name.
        arguments: Further settings.
    """

    def __init__(self, directory: Path, server: str, name: str, *arguments: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory / f"ppdl-{name}"
        number = len(list(directory.glob(f"{name}-*.log")))
        self._log = directory / f"{name}-{number}.log"
        environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [PPDL, "join", f"server={server}", f"participant={name}", *arguments],
                cwd=directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"OMP_NUM_THREADS": "1"},
            )

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def wait(self) -> int:
        """Until it ends; its exit status."""
        return self.process.wait(LIMIT_SECONDS)

    def kill(self) -> None:
        """End it without a word."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def wait_for_checkpoint(self) -> None:
        """Until it has saved a checkpoint that was not there before."""
        path, began = self.directory / "last.ckpt", time.time()
        while not path.exists() or path.stat().st_mtime < began:
            assert self.process.poll() is None, self.log
            assert time.time() - began < LIMIT_SECONDS, self.log
            time.sleep(0.02)

    def rounds(self) -> list[dict[str, str]]:
        """Its metrics, one row a round of its last life."""
        with (self.directory / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
