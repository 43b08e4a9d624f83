"""A participant's checkpoints: what they hold, and that rounds go on after them as if it had not ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
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
from torch import Tensor
from trainer_harness import At, require_left, run

from lightning_ppdl import LargestValues, ParameterServer

__all__ = ["one_thread", "url"]


def saved(path: Path | str) -> Tensor:
    """The parameters within a checkpoint."""
    state = torch.load(path, weights_only=False)["state_dict"]
    return torch.cat([value.reshape(-1) for value in state.values()])


def keeping(directory: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, **{"filename": "{step}", "save_top_k": -1, **settings})


def fit(
    strategy: Any, epochs: int = 3, callbacks: list[Callback] | None = None, **settings: Any
) -> tuple[pl.Trainer, Tiny]:
    own = {key: settings.pop(key) for key in ("val_check_interval", "max_steps") if key in settings}
    module = Tiny()
    keeps = any(isinstance(each, ModelCheckpoint) for each in callbacks or [])
    made = trainer(strategy, epochs, callbacks=callbacks, enable_checkpointing=keeps, **own)
    made.fit(module, loader(), loader(2), **settings)
    return made, module


def require_same(server: ParameterServer, module: Tiny, shared: int) -> None:
    require_left(server, shared)
    require_close(server.parameters(), flat(module))


@pytest.mark.parametrize("every", [2, 3, 6])
def test_a_checkpoint_has_the_parameters_after_its_step(url: str, tmp_path: Path, every: int) -> None:
    """In the middle of rounds and at their ends, of four steps and of an epoch."""
    trained = At("on_train_batch_end", lambda _, module: flat(module))
    run(callbacks=lambda: [trained])
    for round_length in (4, "epoch"):
        address, directory = f"{url}-{round_length}", tmp_path / str(round_length)
        fit(
            everything(address, round_length=round_length), 3, [keeping(directory, every_n_train_steps=every)]
        )
        files = {int(path.stem.partition("=")[2]): path for path in directory.glob("*.ckpt")}
        assert sorted(files) == list(range(every, 19, every))
        for step, path in files.items():
            require_close(saved(path), trained.seen[step - 1])


class Seen(Callback):
    """The parameters and the loss of each validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.parameters: list[Tensor] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
            self.parameters.append(flat(pl_module))


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}])
def test_the_best_checkpoint_has_what_was_validated_and_the_last_one_what_was_trained(
    url: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Validated twice in a round, too; and others' updates come in between."""
    fit(everything(url, "ben", selection=LargestValues(0.5)), 2)
    seen, best = Seen(), ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max")
    last = ModelCheckpoint(tmp_path / "last", save_last=True)
    strategy = everything(url, selection=LargestValues(0.5))
    _, module = fit(strategy, 3, [seen, best, last], **settings)
    assert len(seen.losses) == (9 if settings else 3) and len(set(seen.losses)) == len(seen.losses)
    worst = max(range(len(seen.losses)), key=seen.losses.__getitem__)
    assert worst < len(seen.losses) - 1, "else the best would be the last"
    assert torch.equal(saved(best.best_model_path), seen.parameters[worst])
    assert torch.equal(saved(last.last_model_path), flat(module))


@pytest.mark.parametrize(
    ("round_length", "every", "settings"),
    [
        ("epoch", 6, {}),
        (4, 12, {}),
        (4, None, {"max_steps": 12}),
        ("epoch", None, {}),
    ],
)
def test_from_the_checkpoint_of_a_rounds_end_training_goes_on_as_if_it_had_not_ended(
    url: str, tmp_path: Path, round_length: Any, every: int | None, settings: dict[str, Any]
) -> None:
    """Whether it was saved by steps, or at the end of the epoch; no round is repeated or left out."""

    def strategy(address: str) -> Any:
        return everything(address, selection=LargestValues(0.5), round_length=round_length)

    whole, halves = add_server(f"{url}-whole"), add_server(url)
    expected, whole_module = fit(strategy(f"{url}-whole"), 4)
    fit(strategy(url), 2, [keeping(tmp_path, every_n_train_steps=every)], **settings)
    resumed, module = fit(strategy(url), 4, ckpt_path=tmp_path / "step=12.ckpt")
    assert [report.merged for report in rounds(resumed)] == [True] * len(rounds(resumed))
    require_left(halves, len(rounds(expected)))
    require_close(halves.parameters(), whole.parameters())
    require_close(flat(module), flat(whole_module))


class Killed(Callback):
    """Ends training without a word at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_from_the_checkpoint_of_an_exception_the_open_round_goes_on(url: str, tmp_path: Path) -> None:
    """From what was trained of it, not from the server's parameters."""
    server = add_server(url)
    keep = keeping(tmp_path, save_on_exception=True, every_n_epochs=1)
    with pytest.raises(RuntimeError, match="killed"):
        fit(everything(url), 3, [keep, Killed(9)])
    require_left(server, 1)
    (path,) = [path for path in tmp_path.glob("*.ckpt") if "step=9" in path.stem]
    before = server.parameters()
    start = At("on_before_zero_grad", lambda _, module: flat(module))
    made, module = fit(everything(url), 3, [start], ckpt_path=path)
    require_close(start.seen[0], saved(path))
    assert abs(start.seen[0].numpy() - before).max() > 0.01
    assert [report.round for report in rounds(made)] == [2, 3]
    require_same(server, module, 3)


def test_weights_alone_know_nothing_of_rounds_and_the_server_does(url: str, tmp_path: Path) -> None:
    server = add_server(url)
    keep = keeping(tmp_path, save_weights_only=True)
    fit(everything(url), 2, [keep])
    path = tmp_path / "step=12.ckpt"
    assert "callbacks" not in torch.load(path, weights_only=True)
    module = Tiny.load_from_checkpoint(path)
    require_close(flat(module), server.parameters())
    made = trainer(everything(url), 2)
    made.fit(module, loader())
    assert [(report.round, report.merged) for report in rounds(made)] == [(3, True), (4, True)]
    require_same(server, module, 4)
