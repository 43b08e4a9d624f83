"""What the strategy costs: a participant's epoch as a plain loop, under a Trainer, and under DSSGD.

One participant with 600 images, the paper's MLP, batch 10: 60 steps an epoch. The same quiet Trainer
runs with and without the strategy, which downloads, selects a tenth and uploads after every epoch.
The kinds take turns within one process; an epoch lasts from its first batch to the next one's, so
that set-up is excluded. All but one read batches through this package's loader, which fetches a batch
at once; the ordinary loop stacks rows of a TensorDataset, as most scripts do. Times are the process's
CPU seconds, on one thread, which other work on the machine disturbs less than the clock on the wall;
ratios are taken within each repetition, and their median is printed.
"""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from support import paper_job, parser, print_table
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import DSSGDStrategy
from lightning_ppdl.backends.memory import close, serve
from lightning_ppdl.data import ArrayDataset, Splits, loader
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.protocol import RoundRobin
from lightning_ppdl.simulation import Simulation
from lightning_ppdl.simulation.quiet import quiet_lightning

TARGETS: dict[str, tuple[str, float | None]] = {
    "a Trainer": ("Trainer", 1.10),
    "a plain loop": ("plain loop", 2.0),
    "a plain loop over an ordinary DataLoader": ("plain loop, ordinary DataLoader", None),
}


class Stopwatch(pl.Callback):
    """Seconds of every epoch but the last."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.starts.append(time.process_time())

    @property
    def epochs(self) -> list[float]:
        return [after - before for before, after in pairwise(self.starts)]


def plain_loop(job: Simulation, splits: Splits, share: ArrayDataset) -> list[float]:
    return _loop(job, splits, loader(share, job.batch_size, shuffle=True))


def ordinary_loop(job: Simulation, splits: Splits, share: ArrayDataset) -> list[float]:
    rows = TensorDataset(*share.__getitems__(range(len(share))))
    return _loop(job, splits, DataLoader(rows, job.batch_size, shuffle=True))


def _loop(job: Simulation, splits: Splits, batches: DataLoader[Any]) -> list[float]:
    module = job.make_module(splits)
    optimizer = module.configure_optimizers()
    starts = []
    for _ in range(job.rounds):
        starts.append(time.process_time())
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(module.network(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return [after - before for before, after in pairwise(starts)]


def trainer(job: Simulation, splits: Splits, share: ArrayDataset) -> list[float]:
    watch = Stopwatch()
    batches = loader(share, job.batch_size, shuffle=True)
    job.make_trainer(callbacks=[watch]).fit(job.make_module(splits), train_dataloaders=batches)
    return watch.epochs


def strategy(job: Simulation, splits: Splits, share: ArrayDataset) -> list[float]:
    watch = Stopwatch()
    batches = loader(share, job.batch_size, shuffle=True)
    url = "memory://overhead"
    serve(url, ParameterServer(protocol=RoundRobin(), members=["participant"]))
    try:
        dssgd = DSSGDStrategy(server=url, participant="participant", selection=job.selection)
        made = job.make_trainer(strategy=dssgd, callbacks=[watch])
        made.fit(job.make_module(splits), train_dataloaders=batches)
    finally:
        close(url)
    return watch.epochs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=8)
    options.add_argument("--epochs", type=int, default=21, help="in each fit()")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    job = paper_job(arguments.data_root, rounds=arguments.epochs)
    splits = job.data.load()
    share = splits.train.subset(range(600))
    kinds = {
        "plain loop": plain_loop,
        "plain loop, ordinary DataLoader": ordinary_loop,
        "Trainer": trainer,
        "Trainer with DSSGDStrategy": strategy,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with quiet_lightning():
        for repetition in range(arguments.repetitions + 1):
            for name, run in kinds.items():
                epochs = run(job, splits, share)
                if repetition:  # the first one warms up
                    seconds[name].append(median(epochs))
    rows = [
        [name, f"{1000 * median(values):.1f}", f"{1000 * min(values):.1f}", f"{1000 * max(values):.1f}"]
        for name, values in seconds.items()
    ]
    print_table(["ms an epoch of 60 steps", "median", "least", "most"], rows)
    for name, (reference, target) in TARGETS.items():
        pairs = zip(seconds["Trainer with DSSGDStrategy"], seconds[reference], strict=True)
        ratio = median(ours / theirs for ours, theirs in pairs)
        verdict = "" if target is None else f"; target at most {target:.2f}, "
        verdict += "" if target is None else "reached" if ratio <= target else "MISSED"
        print(f"with the strategy: {ratio:.2f} x {name}{verdict}")


if __name__ == "__main__":
    main()
