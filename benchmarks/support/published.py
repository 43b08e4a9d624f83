"""One published module as a participant: alone, together with others, and what the strategy costs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ppdl import CommunicationCost, ParameterServer, RoundRobin, close, serve
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.records import Manifest
from lightning_ppdl.simulation.scheduler import Scheduler

_URL = "memory://published"
_TIMED = 6  # epochs, of which the last is left out
_QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class Case:
    """A module, its data, and what had to be said for it to become a participant.

    Args:
        make: Makes the LightningModule, drawing from torch's global generator.
        shares: One a participant: makes the DataLoader of its own data.
        measure: The figure on data that no participant holds, of a module in evaluation mode.
        figure: Its name.
        epochs: Of local training; a round is an epoch.
        strategy: Further arguments of the strategy: all that the module needed.
        trainer: Further arguments of the Trainer.
        package: Whose Trainer the module is for.
    """

    make: Callable[[], Any]
    shares: Sequence[Callable[[], DataLoader[Any]]]
    measure: Callable[[Any], float]
    figure: str
    epochs: int
    strategy: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    package: Literal["pytorch_lightning", "lightning.pytorch"] = "pytorch_lightning"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        tensors, parameters: Shared ones, buffers included.
        of: Parameters and floating-point buffers that the module has.
        before: The figure of a new module.
        alone, together: The participants' figures after training, each with its own parameters.
        longer: Those of alone, after as many steps as all participants together take: in turns, the shared
            parameters go through all of them.
        upload_bytes, download_bytes: Of a participant, in one round on average.
        overhead: CPU time of an epoch under the strategy, over that of an epoch without.
    """

    tensors: int
    parameters: int
    of: int
    before: float
    alone: list[float]
    longer: list[float]
    together: list[float]
    upload_bytes: float
    download_bytes: float
    overhead: float


def run(case: Case, repetitions: int) -> Outcome:
    """All of it, from the same initial values throughout; ``repetitions`` are of the overhead."""
    before = _measure(case, _make(case))
    rounds_of_all = case.epochs * len(case.shares)
    alone, longer = (
        [_measure(case, _fit(case, share, max_epochs=epochs)[0]) for share in case.shares]
        for epochs in (case.epochs, rounds_of_all)
    )
    together, sizes, manifest = _collaborate(case)
    module = _make(case)
    buffers = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    return Outcome(
        tensors=len(manifest.parameters),
        parameters=manifest.size,
        of=sum(p.numel() for p in module.parameters()) + buffers,
        before=before,
        alone=alone,
        longer=longer,
        together=together,
        upload_bytes=sizes[0] / rounds_of_all,
        download_bytes=sizes[1] / rounds_of_all,
        overhead=_overhead(case, repetitions),
    )


def loaders(parts: Sequence[Sequence[Tensor]], batch_size: int) -> list[Callable[[], DataLoader[Any]]]:
    """Shuffled loaders of each part's tensors; the order is a participant's own, and repeats."""

    def make(number: int, tensors: Sequence[Tensor]) -> DataLoader[Any]:
        order = torch.Generator().manual_seed(number)
        rows = torch.utils.data.TensorDataset(*tensors)
        return DataLoader(rows, batch_size, shuffle=True, generator=order, drop_last=True)

    return [lambda n=n, part=part: make(n, part) for n, part in enumerate(parts)]  # type: ignore[misc]


def _make(case: Case) -> Any:
    torch.manual_seed(0)
    return case.make()


def _measure(case: Case, module: Any) -> float:
    module.eval()
    with torch.no_grad():
        return case.measure(module)


def _trainer(case: Case, **settings: Any) -> Any:
    lightning = import_module(case.package)
    return lightning.Trainer(**{**_QUIET, "max_epochs": case.epochs, **case.trainer, **settings})


def _strategy(case: Case, server: Any, participant: str) -> Any:
    home = "lightning_ppdl" if case.package == "pytorch_lightning" else "lightning_ppdl.lightning"
    return import_module(home).DSSGDStrategy(server, participant, **case.strategy)


def _fit(case: Case, share: Callable[[], DataLoader[Any]], **settings: Any) -> tuple[Any, list[float]]:
    """The trained module, and the CPU seconds of its epochs but the last."""
    module, watch = _make(case), _stopwatch(case.package)
    _trainer(case, callbacks=[watch], **settings).fit(module, train_dataloaders=share())
    return module, [after - before for before, after in pairwise(watch.starts)]


def _collaborate(case: Case) -> tuple[list[float], list[int], Manifest]:
    """Round robin. The participants are greenlets of one thread: their order, and so all figures, repeat."""
    scheduler = Scheduler()
    names = [f"participant-{number}" for number in range(1, len(case.shares) + 1)]
    server = serve(_URL, ParameterServer(RoundRobin(), members=names, clock=lambda: scheduler.now))
    modules, strategies = [], []

    def add(name: str, share: Callable[[], DataLoader[Any]]) -> None:
        module = _make(case)
        strategy = _strategy(case, MemoryBackend(_URL, wait=scheduler.wait), name)
        made, batches = _trainer(case, strategy=strategy), share()
        scheduler.start(name, lambda: made.fit(module, train_dataloaders=batches))
        modules.append(module)
        strategies.append(strategy)

    try:
        for name, share in zip(names, case.shares):
            add(name, share)
        scheduler.run()
        manifest, _ = server.export()
    finally:
        close(_URL)
    costs = CommunicationCost("upload"), CommunicationCost("download")
    for strategy in strategies:
        for cost in costs:
            cost.update(strategy.reports)
    return [_measure(case, module) for module in modules], [int(cost.compute()) for cost in costs], manifest


def _overhead(case: Case, repetitions: int) -> float:
    """Of the first participant, who is alone at its server; the median over pairs of runs."""

    def epoch(strategy: Any) -> float:
        return median(_fit(case, case.shares[0], strategy=strategy, max_epochs=_TIMED)[1])

    ratios = []
    for _ in range(repetitions):
        without = epoch("auto")
        serve(_URL, ParameterServer(RoundRobin(), members=["only"]))
        try:
            ratios.append(epoch(_strategy(case, _URL, "only")) / without)
        finally:
            close(_URL)
    return median(ratios) if ratios else float("nan")


def _stopwatch(package: str) -> Any:
    """Notes when each epoch starts; of a Trainer of either package."""
    base: Any = import_module(package).Callback

    class Stopwatch(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.starts: list[float] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.starts.append(time.process_time())

    return Stopwatch()
