"""Resuming: a run that was interrupted ends with the very bits of one that was not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy_harness import Tiny, flat
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import (
    Add,
    DSSGDStrategy,
    GrpcService,
    ParameterServer,
    RandomAboveThreshold,
    RoundRobin,
    ServerOptimizer,
    close,
    connect,
    serve,
)
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.release import PlainRelease

Address = Callable[[ParameterServer], Any]


@contextmanager
def in_memory(server: ParameterServer) -> Iterator[str]:
    serve("memory://resume", server)
    try:
        yield "memory://resume"
    finally:
        close("memory://resume")


@contextmanager
def over_grpc(server: ParameterServer) -> Iterator[str]:
    service = GrpcService(server, "127.0.0.1:0")
    service.start()
    try:
        yield service.url
    finally:
        service.stop()


class Drawing(Tiny):
    """Draws from every generator there is."""

    def __init__(self) -> None:
        super().__init__(lr=0.05, dropout=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = random.random() + float(np.random.random())
        return super().training_step(batch, batch_idx) * (1 + 0.1 * noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


class Ben(pl.Callback):
    """Another participant, which takes its turn between this Trainer's rounds."""

    def __init__(self, url: str, server: ParameterServer) -> None:
        self._url, self._server = url, server
        self._member: Participant | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._play()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # After an epoch's last round not yet: its turn is pending when the other one leaves.
        if not trainer.is_last_batch:
            self._play()

    def _play(self) -> None:
        rounds = {member.name: member.rounds for member in self._server.status().members}
        if rounds.get("anna", 0) == rounds.get("ben", 0):
            return
        if self._member is None:
            manifest = self._server.export()[0]
            release = PlainRelease(RandomAboveThreshold(0.5, 0.0), 0.05)
            self._member = Participant("ben", connect(self._url), manifest, release, seed=5)
            self._member.join()
        start = self._member.begin_round(torch.zeros(self._member.manifest.size))
        assert start is not None
        self._member.end_round(start * 0.9)


def batches(generator: torch.Generator | None) -> DataLoader[Any]:
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=stream)
    return DataLoader(TensorDataset(x, x[:, :2]), batch_size=4, shuffle=True, generator=generator)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def trainer(url: str, epochs: int, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    strategy = DSSGDStrategy(
        url,
        "anna",
        RandomAboveThreshold(0.6, 0.0),
        bound=0.05,
        initial="own",
        seed=1,
        turn_timeout_seconds=20.0,
        **settings,
    )
    return pl.Trainer(
        strategy=strategy,
        callbacks=callbacks,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def state(module: Drawing, made: pl.Trainer, server: ParameterServer) -> list[np.ndarray[Any, Any]]:
    moments = [value for entry in made.optimizers[0].state.values() for value in entry.values()]
    return [flat(module).numpy(), server.parameters(), *(moment.numpy() for moment in moments)]


@pytest.mark.parametrize("own_generator", [False, True], ids=["global", "loaders-own"])
@pytest.mark.parametrize("settings", [{}, {"round_length": 2}, {"download_fraction": 0.5}], ids=str)
@pytest.mark.parametrize("address", [in_memory, over_grpc])
def test_resumed_at_an_epochs_end_it_is_the_same_run(
    address: Address, settings: dict[str, Any], own_generator: bool, tmp_path: Path
) -> None:
    ends = []
    for stops in ((4,), (2, 4)):
        server = ParameterServer(merge=Add(), protocol=RoundRobin(), members=["anna", "ben"])
        seed_all(7)
        with address(server) as url:
            ben = Ben(url, server)
            kept: str | None = None
            for epochs in stops:
                generator = torch.Generator().manual_seed(3) if own_generator else None
                made, module = trainer(url, epochs, [ben], **settings), Drawing()
                made.fit(module, batches(generator), ckpt_path=kept)
                kept = str(tmp_path / "kept.ckpt")
                made.save_checkpoint(kept)
                ends.append((epochs, state(module, made, server)))
                seed_all(epochs)
    (_, whole), (_, half), (_, resumed) = ends
    assert not np.array_equal(whole[0], half[0])
    for one, two in zip(whole, resumed, strict=True):
        assert np.array_equal(one, two)


class Stateful:
    """A loader that knows where it is, as torchdata's does."""

    def __init__(self) -> None:
        self._plain, self._at, self._order = batches(None), 0, torch.get_rng_state()

    def __len__(self) -> int:
        return len(self._plain)

    def __iter__(self) -> Iterator[Any]:
        if self._at == 0:
            self._order = torch.get_rng_state()
        going_on, now = self._at, torch.get_rng_state()
        torch.set_rng_state(self._order)
        order = list(self._plain)
        if going_on:
            torch.set_rng_state(now)
        for batch in order[going_on:]:
            self._at = (self._at + 1) % len(order)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at, self._order = state_dict["at"], state_dict["order"]


MERGES: dict[str, Callable[[], Any]] = {
    "change": Add,
    "gradient": lambda: ServerOptimizer(partial(torch.optim.SGD, lr=0.05)),
}


class Stop(Exception):
    """The machine goes down."""


class StopAfter(pl.Callback):
    def __init__(self, steps: int | None) -> None:
        self._steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._steps:
            raise Stop


@pytest.mark.parametrize("quantity", ["change", "gradient"])
@pytest.mark.parametrize("round_length", ["epoch", 4])
def test_resumed_in_the_middle_of_a_round_with_a_loader_that_can_it_is_the_same_run(
    round_length: Any, quantity: Any, tmp_path: Path
) -> None:
    ends = []
    for interrupted in (False, True):
        server = ParameterServer(merge=MERGES[quantity]())
        seed_all(7)
        with in_memory(server) as url:
            every = ModelCheckpoint(
                tmp_path / str(interrupted), filename="{step}", every_n_train_steps=1, save_top_k=-1
            )
            settings = {"round_length": round_length, "quantity": quantity}
            made, module = (
                trainer(url, 3, [every, StopAfter(9 if interrupted else None)], **settings),
                Drawing(),
            )
            if interrupted:
                with pytest.raises(Stop):
                    made.fit(module, Stateful())
                uploads = server.status().uploads
                seed_all(8)
                made, module = trainer(url, 3, [], **settings), Drawing()
                made.fit(module, Stateful(), ckpt_path=str(tmp_path / "True" / "step=9.ckpt"))
                assert server.status().uploads > uploads
            else:
                made.fit(module, Stateful())
            ends.append([*state(module, made, server), np.array(server.status().uploads)])
    for one, two in zip(*ends, strict=True):
        assert np.array_equal(one, two)
