"""Errors in the middle of a round: the turn is free at once, nothing half done is merged, one comes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger
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
from torch.utils.data import DataLoader
from trainer_harness import PATIENCE_SECONDS, At, require_free, require_left

from lightning_ppdl import ParameterServer, RoundRobin
from lightning_ppdl.errors import NonFiniteUpdateError

__all__ = ["one_thread", "url"]


@pytest.fixture
def server(url: str) -> ParameterServer:
    """One that would wait for long for a participant that has the turn."""
    return add_server(url, protocol=RoundRobin(), lease_seconds=1000.0)


patient = partial(everything, turn_timeout_seconds=PATIENCE_SECONDS)


class Trouble:
    """Raises at one call, and never again."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left = at
        self.error = error

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def in_hook(name: str, trouble: Trouble) -> Callback:
    def look(made: pl.Trainer, _: Any) -> None:
        if not made.sanity_checking or "sanity" in name:
            trouble()

    return At(name, look)


class Failing(Tiny):
    def __init__(
        self, step: Callable[[], None] = lambda: None, check: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self.step, self.check = step, check

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.step()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.check()
        super().validation_step(batch, batch_idx)


def fails(made: pl.Trainer, module: Tiny, data: Any = None) -> None:
    """It ends with the error; Lightning makes an exit of Ctrl-C."""
    with pytest.raises((RuntimeError, SystemExit)):
        made.fit(module, data or loader(), loader(2))


def require_clean_and_back(
    server: ParameterServer, url: str, made: pl.Trainer, module: Tiny, shared: int
) -> None:
    """Nobody waits for anna, nothing of the open round was merged; and her next fit() shares all the rest."""
    require_left(server, shared)
    assert server.version == shared == len(rounds(made))
    require_free(url)
    made.fit(module, loader(), loader(2))
    assert [report.round for report in rounds(made)] == list(range(1, len(rounds(made)) + 1))
    assert made.current_epoch == 3 and len(rounds(made)) > shared
    require_left(server, len(rounds(made)))
    require_close(server.parameters(), flat(module))


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: RuntimeError("out of luck"),
    "Ctrl-C": KeyboardInterrupt,
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["step", "check"])
def test_in_a_step(server: ParameterServer, url: str, where: str, error: str) -> None:
    """The second epoch's third batch, or the second epoch's validation, in the middle of a round of 8."""
    module = Failing(**{where: Trouble(9, ERRORS[error]())})
    made = trainer(patient(url, round_length=8))
    fails(made, module)
    assert made.global_step == {"step": 8, "check": 12}[where]
    require_clean_and_back(server, url, made, module, 1)


@pytest.mark.parametrize(
    ("hook", "call", "shared"),
    [
        ("on_train_epoch_start", 2, 1),
        ("on_train_batch_start", 9, 1),
        ("on_before_backward", 9, 1),
        ("on_before_optimizer_step", 9, 1),
        ("on_before_zero_grad", 9, 1),
        ("on_train_batch_end", 9, 1),
        ("on_validation_start", 2, 2),
        ("on_validation_batch_end", 9, 2),
        ("on_train_epoch_end", 2, 2),
    ],
)
def test_in_a_users_callback(server: ParameterServer, url: str, hook: str, call: int, shared: int) -> None:
    """Rounds of five steps; in the second epoch, 7 to 12 of them are taken."""
    trouble = in_hook(hook, Trouble(call, RuntimeError("out of luck")))
    made, module = trainer(patient(url, round_length=5), callbacks=[trouble]), Tiny()
    fails(made, module)
    require_clean_and_back(server, url, made, module, shared)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_sanity_check_start"])
def test_before_training_nobody_has_joined(server: ParameterServer, url: str, hook: str) -> None:
    trouble = in_hook(hook, Trouble(1, RuntimeError("out of luck")))
    made = trainer(patient(url), callbacks=[trouble])
    fails(made, Tiny())
    assert server.status().members == ()


class Broken(torch.utils.data.Dataset[Any]):
    """Cannot read one of its records, once."""

    def __init__(self, record: int) -> None:
        self.records: Any = loader().dataset
        self.trouble = Trouble(record, RuntimeError("a disk"))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        self.trouble()
        return self.records[index]


@pytest.mark.parametrize(
    ("record", "round_length", "shared"), [(30, 5, 1), (30, "epoch", 1), (3, "epoch", 0)]
)
def test_in_the_data_set(
    server: ParameterServer, url: str, record: int, round_length: Any, shared: int
) -> None:
    """In the eighth batch, or in the first, before which no turn is taken."""
    made, module = trainer(patient(url, round_length=round_length)), Tiny()
    data: DataLoader[Any] = DataLoader(Broken(record), batch_size=4)
    fails(made, module, data)
    if shared:
        require_clean_and_back(server, url, made, module, shared)
    else:
        assert all(not member.present for member in server.status().members)
        require_free(url)


def test_in_a_checkpoint_that_cannot_be_written(server: ParameterServer, url: str, tmp_path: Any) -> None:
    class Full(ModelCheckpoint):
        def _save_checkpoint(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    keep = Full(tmp_path, every_n_train_steps=3)
    made = trainer(patient(url), callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(OSError, match="No space"):
        made.fit(Tiny(), loader())
    require_left(server, 0)
    require_free(url)


class Careless(Callback):
    """Cannot cope with the error that it is told of."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, error: BaseException) -> None:
        raise OSError(28, "No space left on device")


class Closed(Logger):
    """Cannot write its last line."""

    name, version = "closed", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "settings",
    [
        {"callbacks": [Careless()]},
        {"logger": Closed()},
    ],
    ids=["a callback", "a logger"],
)
def test_where_not_even_the_error_is_handled(
    server: ParameterServer, url: str, settings: dict[str, Any]
) -> None:
    """Lightning goes on to its teardown only if all that it tells of an error take it well."""
    module = Failing(step=Trouble(9, RuntimeError("out of luck")))
    with pytest.raises(OSError, match="No space"):
        trainer(patient(url), **settings).fit(module, loader())
    require_left(server, 1)
    require_free(url)


@pytest.mark.parametrize("round_length", ["epoch", 5])
def test_a_loss_that_is_not_finite(server: ParameterServer, url: str, round_length: Any) -> None:
    """The round is not shared, the others go on; and this participant too, from the server's parameters."""

    class Diverging(Tiny):
        batches = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.batches += 1
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.batches == 9 else loss

    made, module = trainer(patient(url, round_length=round_length)), Diverging()
    with pytest.raises(NonFiniteUpdateError, match="diverged"):
        made.fit(module, loader())
    assert not torch.isfinite(flat(module)).all()
    require_left(server, 1)
    before = server.parameters()
    assert np.isfinite(before).all()
    require_free(url)
    made.fit(module, loader())
    require_left(server, len(rounds(made)))
    require_close(server.parameters(), flat(module))
    assert torch.isfinite(flat(module)).all() and len(rounds(made)) >= 3
