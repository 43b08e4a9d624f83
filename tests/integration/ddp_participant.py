"""A participant of two devices, run as a script: Lightning starts the second rank from ``sys.argv``.

Each rank writes what it saw to ``RESULTS.RANK``, as JSON: one entry a scenario.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from strategy_harness import Tiny, flat
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import (
    Add,
    Asynchronous,
    DSSGDDDPStrategy,
    LargestValues,
    Ledger,
    ParameterServer,
    ParticipantLevel,
    PPDLError,
    Selection,
    ServerOptimizer,
    connect,
    serve,
)
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.release import PlainRelease

# 23 records: the two ranks get 12 each, one record twice.
RECORDS, BATCH = 23, 4


def batches(shuffle: bool = True) -> DataLoader[Any]:
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(RECORDS, 5, generator=stream)
    return DataLoader(TensorDataset(x, x[:, :2] * 0.5), batch_size=BATCH, shuffle=shuffle)


class Normed(Tiny):
    """With a buffer that each rank would have its own values of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def fit(module: pl.LightningModule, strategy: Any, epochs: int = 3, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        strategy=strategy,
        devices=2,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, batches())
    return trainer


def make(url: str, **settings: Any) -> DSSGDDDPStrategy:
    settings = {"selection": LargestValues(1.0), "initial": "own", **settings}
    return DSSGDDDPStrategy(url, "anna", **settings)


def seen(module: pl.LightningModule, trainer: pl.Trainer, strategy: Any, server: ParameterServer) -> Any:
    status = server.status()
    return {
        "values": flat(module).tolist(),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "reports": len(strategy.reports),
        "uploads": status.uploads,
        "members": len(status.members),
        "server": server.parameters().tolist() if status.uploads else None,
    }


def as_plain_training() -> Any:
    """Sharing everything, alone: twice fit(), so that optimizers are kept as well."""
    server = serve("memory://plain", ParameterServer(merge=Add()))
    module, plain = Tiny(), Tiny()
    strategy = make("memory://plain")
    trainer = fit(module, strategy)
    fit(plain, "ddp")
    result = seen(module, trainer, strategy, server)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, batches())
    return {**result, "plain": flat(plain).tolist(), "reports_later": len(strategy.reports)}


def others_upload_too(url: str = "memory://others", **settings: Any) -> Any:
    """What rank zero downloads has to reach rank one, in rounds of two steps."""
    server = serve(url, ParameterServer(merge=Add(), protocol=Asynchronous()))
    strategy = make(url, round_length=2, **settings)

    class Ben(pl.Callback):
        member: Participant | None = None

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.is_global_zero:
                return
            if self.member is None:
                manifest, _ = server.export()
                self.member = Participant("ben", connect(url), manifest, PlainRelease(LargestValues(1.0)))
                self.member.join()
            start = self.member.begin_round(torch.zeros(self.member.manifest.size))
            assert start is not None
            self.member.end_round(start + 0.25)

    module = Normed()
    return seen(module, fit(module, strategy, callbacks=[Ben()]), strategy, server)


def others_upload_too_and_training_goes_on() -> Any:
    """The same, while exchanges are on their way."""
    return others_upload_too("memory://overlap", overlap_steps=1)


def gradients() -> Any:
    """The mean over the ranks is what is shared."""
    server = serve(
        "memory://gradients", ParameterServer(merge=ServerOptimizer(partial(torch.optim.SGD, lr=0.1)))
    )
    strategy = make("memory://gradients", quantity="gradient")
    module = Tiny(momentum=0.0)
    return seen(module, fit(module, strategy, epochs=1, limit_train_batches=1), strategy, server)


def budget() -> Any:
    """Rank zero alone has the ledger: that training ends it has to tell the others."""
    server = serve("memory://budget", ParameterServer(merge=Add()))
    privacy = ParticipantLevel(noise_multiplier=2.0, clip=1.0, delta=1e-5, max_epsilon=6.0)
    strategy = make(
        "memory://budget",
        selection=None,
        initial=0,
        privacy=privacy,
        ledger=Ledger(None),
        noise=SeededNoise(0, "noise", simulated=True),
    )
    module = Tiny()
    return seen(module, fit(module, strategy, epochs=50), strategy, server)


def failure() -> Any:
    """An error of rank zero's exchange ends both, and frees the turn."""

    class Failing(Selection):
        fraction = 1.0

        def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
            raise RuntimeError("no selection today")

    server = serve("memory://failure", ParameterServer(merge=Add()))
    try:
        fit(Tiny(), make("memory://failure", selection=Failing()))
    except (PPDLError, RuntimeError) as error:
        return {"error": type(error).__name__, "text": str(error), "awaited": server.status().awaited}
    return {"error": None}


SCENARIOS: list[Callable[[], Any]] = [
    as_plain_training,
    others_upload_too,
    others_upload_too_and_training_goes_on,
    gradients,
    budget,
    failure,
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {scenario.__name__: scenario() for scenario in SCENARIOS}
    Path(f"{sys.argv[1]}.{os.environ.get('LOCAL_RANK', '0')}").write_text(json.dumps(results))
