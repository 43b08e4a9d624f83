"""Ctrl-C and SIGTERM to processes that train against ``ppdl serve``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_harness import Served, wait_for
from strategy_harness import everything, one_thread
from trainer_harness import run

from lightning_ppdl import connect

__all__ = ["one_thread"]

SCRIPT = Path(__file__).with_name("trainer_participant.py")
AT_ONCE_SECONDS = 10.0
"""Far below the lease of ten minutes, and enough for a busy machine."""


class Training:
    """Processes that train, each under its name.

    Args:
        directory: Where they say how they are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def start(self, url: str) -> None:
        """Have them train with the server at ``url``."""
        self.status = connect(url).status
        (self._directory / "url.part").write_text(url)
        (self._directory / "url.part").rename(self._directory / "url")

    @property
    def present(self) -> set[str]:
        return {member.name for member in self.status().members if member.present}

    def at_work(self) -> str:
        """Who has the turn, once it trains."""
        wait_for(lambda: len(self.status().awaited) == 1)
        (name,) = self.status().awaited
        wait_for((self._directory / f"{name}.begun").exists)
        return name

    def end(self, name: str, number: signal.Signals) -> int:
        """Send a signal; the exit status, which must come at once, as must the end of its membership."""
        sent, path = time.monotonic(), self._directory / f"{name}.exit"
        os.kill(int((self._directory / f"{name}.pid").read_text()), number)
        wait_for(path.exists)
        assert name not in self.present
        assert time.monotonic() - sent < AT_ONCE_SECONDS
        return int(path.read_text())


@contextmanager
def training(directory: Path, *names: str) -> Iterator[Training]:
    command: list[str | Path] = [sys.executable, SCRIPT, directory, *names]
    with (directory / "training.out").open("w") as out:
        parent = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        yield Training(directory)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def test_signals_free_the_turn_at_once(tmp_path: Path) -> None:
    """To one that waits for its turn, to one that has it, and to the next that gets it."""
    names = ["anna", "ben", "cleo"]
    with (
        training(tmp_path, *names) as participants,
        Served(tmp_path / "server", "protocol=round_robin", "lease_seconds=600") as served,
    ):
        participants.start(served.url)
        wait_for(lambda: participants.present == set(names))
        holder = participants.at_work()
        waiting, last = (name for name in names if name != holder)
        assert participants.end(waiting, signal.SIGINT) == 1
        assert participants.status().awaited == (holder,)
        assert participants.end(holder, signal.SIGINT) == 1
        assert participants.at_work() == last
        # Lightning's choice: it was asked to end, and did.
        assert participants.end(last, signal.SIGTERM) == 0

        other = run(everything(served.url, "dora", turn_timeout_seconds=5.0), epochs=1)
        assert other.trainer.global_step == 6
        status = participants.status()
        assert (status.version, status.rejections) == (1, {})
        assert [member.rounds for member in status.members if member.name in names] == [0, 0, 0]
