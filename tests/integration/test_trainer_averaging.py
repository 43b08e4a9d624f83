"""Averages of parameters: the server gets what was trained, the average stays at home."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from strategy_harness import (
    Tiny,
    add_server,
    everything,
    flat,
    loader,
    one_thread,
    require_close,
    rounds,
    trainer,
    url,
)
from torch import Tensor, nn
from trainer_harness import At, require_left, require_plain, run

from lightning_ppdl import LargestValues, connect, wire
from lightning_ppdl.records import DownloadRequest, SparseUpdate

__all__ = ["one_thread", "url"]

AVERAGES: dict[str, Callable[[], Callback]] = {
    "ema": partial(EMAWeightAveraging, decay=0.7),
    "mean": WeightAveraging,
    "swa": partial(StochasticWeightAveraging, swa_lrs=0.05, swa_epoch_start=0.5, annealing_epochs=2),
}


def values(_: Any, module: nn.Module) -> Tensor:
    return flat(module)


@pytest.mark.parametrize("round_length", ["epoch", 4, 100])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_server_gets_what_was_trained_and_the_module_ends_as_the_average(
    url: str, average: str, round_length: Any
) -> None:
    """Training ends in the middle of a round of 4 steps, and of one of 100."""
    trained: list[At] = []

    def callbacks() -> list[Callback]:
        trained.append(At("on_train_epoch_end", values))
        return [AVERAGES[average](), trained[-1]]

    alone = require_plain(url, {"round_length": round_length}, callbacks, averaged=True)
    live = trained[1].seen[-1]
    assert alone.ends == {"epoch": [6, 12, 18], 4: [4, 8, 12, 16, 18], 100: [18]}[round_length]
    assert (flat(alone.module) - live).abs().max() > 1e-3
    require_close(alone.server.parameters(), live)


@pytest.mark.parametrize("average", ["ema", "mean"])
def test_validation_of_the_average_in_the_middle_of_a_round_stays_out_of_the_round(
    url: str, average: str
) -> None:
    validated: list[At] = []

    def callbacks() -> list[Callback]:
        validated.append(At("on_validation_batch_end", values))
        return [AVERAGES[average](), validated[-1]]

    trained = At("on_train_batch_end", values)
    start = flat(Tiny())
    run(callbacks=lambda: [trained])
    steps = [start, *trained.seen]
    settings: dict[str, Any] = {"val_check_interval": 2, "max_steps": 16}
    alone = require_plain(url, {"round_length": 4}, callbacks, averaged=True, **settings)
    for seen, expected in zip(validated[1].seen, validated[0].seen, strict=True):
        require_close(seen, expected)
    norms = [float((steps[end] - steps[end - 4]).norm()) for end in (4, 8, 12, 16)]
    assert [report.update_norm for report in rounds(alone.trainer)] == pytest.approx(norms, rel=1e-3)
    require_close(alone.server.parameters(), steps[16])


def add_one(url: str) -> None:
    """Another participant, whose update is 1 for every entry."""
    backend = connect(url)
    backend.join("ben", backend.export()[0])
    version = wire.decode_download(backend.download(DownloadRequest(1.0)), 34).version
    update = SparseUpdate("ben", 1, version, np.arange(34), np.ones(34, np.float32))
    backend.upload(wire.encode_update(update, 34))
    backend.leave()


def test_what_is_downloaded_enters_the_average(url: str) -> None:
    """The participant itself trains nothing: the second epoch starts from the other's parameters."""
    server = add_server(url)
    start = flat(Tiny())

    def between_the_rounds(made: pl.Trainer, _: Any) -> None:
        if made.current_epoch == 0:
            add_one(url)

    between = At("on_train_epoch_end", between_the_rounds)
    validated = At("on_validation_batch_end", values)
    alone = run(
        everything(url),
        module=lambda: Tiny(lr=0.0),
        epochs=2,
        callbacks=lambda: [EMAWeightAveraging(decay=0.7), between, validated],
    )
    require_close(server.parameters(), start + 1)
    require_close(flat(alone.module), start + 1 - 0.7**6)
    require_close(validated.seen[-1], start + 1 - 0.7**6)
    assert [report.uploaded_fraction for report in rounds(alone.trainer)] == [0.0, 0.0]


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_a_resumed_average_goes_on(url: str, average: str, tmp_path: Path) -> None:
    """Its checkpoint has the average where the parameters usually are."""

    def fit(address: str, epochs: int, *more: Callback, **settings: Any) -> Tiny:
        module = Tiny()
        strategy = everything(address, selection=LargestValues(0.5))
        made = trainer(strategy, epochs, callbacks=[make(), *more], enable_checkpointing=bool(more))
        made.fit(module, loader(), **settings)
        return module

    # A start given as an epoch: a share of max_epochs would be another one for the shorter run.
    make = (
        AVERAGES["ema"]
        if average == "ema"
        else partial(StochasticWeightAveraging, swa_lrs=0.05, swa_epoch_start=2)
    )
    whole, halves = add_server(f"{url}-whole"), add_server(url)
    expected = fit(f"{url}-whole", 4)
    fit(url, 2, ModelCheckpoint(tmp_path, save_last=True))
    actual = fit(url, 4, ckpt_path=str(tmp_path / "last.ckpt"))
    require_left(halves, 4)
    np.testing.assert_allclose(halves.parameters(), whole.parameters(), atol=1e-6)
    assert torch.allclose(flat(actual), flat(expected), atol=1e-6)


class Normed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("round_length", ["epoch", 4])
def test_the_pass_that_refreshes_batch_norm_after_averaging_is_no_round(url: str, round_length: Any) -> None:
    """It trains nothing, and evaluates the averaged parameters: a download would overwrite them."""
    trained: list[At] = []

    def callbacks() -> list[Callback]:
        trained.append(At("on_train_batch_end", values))
        return [AVERAGES["swa"](), trained[-1]]

    settings: dict[str, Any] = {"module": Normed, "callbacks": callbacks}
    alone = require_plain(url, {"round_length": round_length}, averaged=True, **settings)
    assert alone.rounds == {"epoch": 3, 4: 5}[round_length]
    require_close(alone.server.parameters(), trained[1].seen[17])
    plain = run(**settings).module
    for name, buffer in plain.named_buffers():
        require_close(alone.module.get_buffer(name), buffer)
