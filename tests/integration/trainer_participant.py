"""Participants in processes of their own, for signals: ``trainer_participant.py DIRECTORY NAME...``.

Imports, waits for ``DIRECTORY/url``, and makes a process for each name. ``NAME.pid`` has its number; there is
a ``NAME.begun`` once it trains, which would take minutes; and its exit status comes to ``NAME.exit``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from strategy_harness import Tiny, everything, loader, trainer


class Slow(Tiny):
    """Takes its time for each batch, and says that it has begun."""

    def __init__(self, begun: Path) -> None:
        super().__init__()
        self.begun = begun

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.begun.touch()
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)


def main() -> None:
    directory, *names = sys.argv[1:]
    torch.set_num_threads(1)
    address = Path(directory, "url")
    while not address.exists():
        time.sleep(0.05)
    url, children = address.read_text(), {}
    for name in names:
        child = os.fork()
        if not child:
            strategy = everything(url, name, round_length=1000)
            trainer(strategy, epochs=500).fit(Slow(Path(directory, f"{name}.begun")), loader())
            sys.exit("trained to the end")
        children[child] = name
        Path(directory, f"{name}.pid").write_text(str(child))
    while children:
        child, status = os.wait()
        exit_status = Path(directory, f"{children.pop(child)}.exit")
        exit_status.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
        exit_status.with_suffix(".part").rename(exit_status)


if __name__ == "__main__":
    main()
