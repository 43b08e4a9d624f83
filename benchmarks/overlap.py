"""What overlap_steps saves: rounds over a slow line, waited for, and with the exchange on its way meanwhile.

    python benchmarks/overlap.py

A real Trainer and a server in memory, behind a line that takes its time for each byte. The floor is plain
training without exchanges.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import Asynchronous, DSSGDStrategy, LargestValues, ParameterServer
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.records import DownloadRequest, Receipt


class SlowLine(MemoryBackend):
    """A server in memory at the end of a line of ``megabytes`` a second."""

    def __init__(self, server: ParameterServer, megabytes: float) -> None:
        super().__init__("memory://overlap", server)
        self._rate = megabytes * 1e6

    def download(self, request: DownloadRequest) -> bytes:
        message = super().download(request)
        time.sleep(len(message) / self._rate)
        return message

    def upload(self, message: bytes) -> Receipt:
        time.sleep(len(message) / self._rate)
        return super().upload(message)


class Regression(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def seconds_a_round(overlap_steps: int | None, options: argparse.Namespace) -> float:
    """Of the rounds after the first; None trains without exchanges."""
    strategy: Any = "auto"
    if overlap_steps is not None:
        line = SlowLine(ParameterServer(Asynchronous()), options.megabytes)
        strategy = DSSGDStrategy(line, "anna", LargestValues(0.1), overlap_steps=overlap_steps)
    ends: list[float] = []

    class Clock(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            ends.append(time.perf_counter())

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(options.steps * 256, 64))
    pl.Trainer(
        strategy=strategy,
        callbacks=[Clock()],
        max_epochs=options.rounds,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Regression(options.width), DataLoader(data, batch_size=256))
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60, help="in a round")
    parser.add_argument("--width", type=int, default=4000, help="P is about 129 times that")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of the line, a second")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(1)
    plain = seconds_a_round(None, options)
    waited = seconds_a_round(0, options)
    print(f"P = {129 * options.width + 64}, {options.steps} steps a round, {options.megabytes:g} MB/s")
    print(f"{'':<28}{'s a round':>10}{'of plain training':>20}")
    print(f"{'no exchange':<28}{plain:>10.3f}{1:>20.2f}")
    print(f"{'waited for':<28}{waited:>10.3f}{waited / plain:>20.2f}")
    for steps in (options.steps // 4, options.steps // 2, options.steps):
        taken = seconds_a_round(steps, options)
        print(f"{f'overlap_steps={steps}':<28}{taken:>10.3f}{taken / plain:>20.2f}")


if __name__ == "__main__":
    main()
