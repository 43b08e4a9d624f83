"""What the benchmarks share: the paper's job on MNIST, and plain tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lightning_ppdl.data import MNIST
from lightning_ppdl.models import mlp
from lightning_ppdl.partition import IID
from lightning_ppdl.simulation import Simulation


def parser(description: str | None) -> argparse.ArgumentParser:
    """With ``--data-root``, which every benchmark on MNIST takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data-root", help="folder with MNIST's four files; downloaded if not given")
    return made


def paper_job(data_root: str | None, **changes: Any) -> Simulation:
    """30 participants with 600 images each, the paper's MLP, batch 10, SGD lr 0.05; no baselines."""
    settings: dict[str, Any] = {
        "data": MNIST(root=data_root, normalize=True),
        "partition": IID(samples=600),
        "model": mlp,
        "optimizer": partial(torch.optim.SGD, lr=0.05),
        "participants": 30,
        "batch_size": 10,
        "baselines": (),
    }
    return Simulation(**{**settings, **changes})


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
