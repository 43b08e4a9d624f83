"""Learning-rate and batch-size finders: they train on trial, and nobody else hears of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from pytorch_lightning.tuner.tuning import Tuner
from strategy_harness import Tiny, add_server, flat, loader, one_thread, require_close, rounds, trainer, url
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader
from trainer_harness import At, Calls, require_left, watched

from lightning_ppdl import DSSGDStrategy, ParticipantLevel, RecordLevel, RoundRobin
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.ledger import Ledger

__all__ = ["one_thread", "url"]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The finders keep a checkpoint beside the program, and collect garbage for each size that they try."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pytorch_lightning.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)
    yield
    assert list(tmp_path.glob(".*")) == [], "a finder's checkpoint is left"


class Tunable(Tiny):
    """Has what the finders set, and loaders that follow it."""

    def __init__(self, schedule: str = "none") -> None:
        super().__init__()
        self.batch_size = 2
        self.schedule = schedule
        self.trained = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained += 1
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(2)

    def configure_optimizers(self) -> Any:
        ((optimizer,), _) = super().configure_optimizers()
        make: Any = {
            "none": None,
            "step": lambda: StepLR(optimizer, 2, 0.5),
            "lambda": lambda: LambdaLR(optimizer, lambda epoch: 0.9**epoch),
            "cycle": lambda: OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches)),
        }[self.schedule]
        interval = "step" if self.schedule == "cycle" else "epoch"
        scheduler = {"lr_scheduler": {"scheduler": make(), "interval": interval}} if make else {}
        return {"optimizer": optimizer, **scheduler}


FINDERS: dict[str, Callable[[], Callback]] = {
    "lr": lambda: LearningRateFinder(num_training_steps=25, max_lr=1.0),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
}
TUNERS: dict[str, Callable[[Tuner, pl.LightningModule], Any]] = {
    "lr": lambda tuner, module: tuner.lr_find(module, num_training=25, max_lr=1.0),
    "batch size": lambda tuner, module: tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2),
}


def tuned(
    strategy: Any, what: str, how: str, schedule: str, look: Callable[[], Any] = lambda: None
) -> tuple[pl.Trainer, Tunable, list[float]]:
    """Find a setting, by a Tuner before training or by a callback at its beginning, and train four epochs.

    Returns:
        Trainer, module, and the learning rate at the beginning of each epoch.
    """
    pl.seed_everything(7, verbose=False)
    module = Tunable(schedule)
    rates = At("on_train_epoch_start", lambda made, _: made.optimizers[0].param_groups[0]["lr"])
    found = At("on_sanity_check_start", lambda *_: look())
    made = trainer(strategy, 4, callbacks=[*([FINDERS[what]()] if how == "callback" else []), rates, found])
    if how == "tuner":
        TUNERS[what](Tuner(made), module)
        look()
    made.fit(module)
    return made, module, rates.seen


@pytest.mark.parametrize(
    ("what", "how", "schedule"),
    [
        ("lr", "tuner", "none"),
        ("lr", "tuner", "step"),
        ("lr", "tuner", "lambda"),
        ("lr", "tuner", "cycle"),
        ("lr", "callback", "lambda"),
        ("lr", "callback", "cycle"),
        ("batch size", "tuner", "step"),
        ("batch size", "tuner", "cycle"),
        ("batch size", "callback", "step"),
    ],
)
def test_a_finder_asks_nothing_of_the_server_and_training_follows_what_it_found(
    url: str, what: str, how: str, schedule: str
) -> None:
    plain, expected, rates = tuned("auto", what, how, schedule)
    found = (expected.lr != 0.1, expected.batch_size != 2)
    assert found == ((True, False) if what == "lr" else (False, True))
    server = add_server(url, protocol=RoundRobin())
    calls = Calls(url)
    after_the_search: list[list[str]] = []
    strategy = watched(calls)
    made, module, ours = tuned(
        strategy, what, how, schedule, lambda: after_the_search.append(list(calls.made))
    )
    assert after_the_search and all(calls == [] for calls in after_the_search)
    assert (module.lr, module.batch_size) == (expected.lr, expected.batch_size)
    assert ours == rates and made.global_step == plain.global_step
    require_close(flat(module), flat(expected))
    require_close(server.parameters(), flat(module))
    require_left(server, 4)


def test_a_search_between_two_fits_forgets_no_round_and_no_momentum(url: str) -> None:
    def two_fits(address: str, search: bool) -> tuple[pl.Trainer, Tunable]:
        pl.seed_everything(7, verbose=False)
        module = Tunable("step")
        made = trainer(watched(Calls(address), 0.5), 2)
        made.fit(module)
        made.fit_loop.max_epochs = 4
        if search:
            Tuner(made).lr_find(module, num_training=25, max_lr=1.0, update_attr=False)
        made.fit(module)
        return made, module

    server, without = add_server(url), add_server(f"{url}-without")
    made, module = two_fits(url, True)
    _, expected = two_fits(f"{url}-without", False)
    assert [report.round for report in rounds(made)] == [1, 2, 3, 4]
    require_left(server, 4)
    require_close(flat(module), flat(expected))
    require_close(server.parameters(), without.parameters())


@pytest.mark.parametrize("method", ["validate", "test"])
def test_a_batch_size_for_evaluation(url: str, method: Any) -> None:
    class Evaluated(Tunable):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

        test_dataloader = val_dataloader

    server, module = add_server(url), Evaluated()
    made = trainer(DSSGDStrategy(url, "anna", turn_timeout_seconds=0.5))
    Tuner(made).scale_batch_size(module, method=method, max_trials=2, steps_per_trial=1)
    assert module.batch_size == 4
    assert server.status().members == ()


@pytest.mark.parametrize("how", ["tuner", "callback"])
@pytest.mark.parametrize("what", FINDERS)
def test_beside_private_steps_a_search_is_refused_before_it_sees_data(
    url: str, tmp_path: Path, what: str, how: str
) -> None:
    server, module = add_server(url), Tunable()
    privacy = RecordLevel(noise_multiplier=1.0, delta=1e-3)
    strategy = DSSGDStrategy(url, "anna", privacy=privacy, ledger=tmp_path / "anna.ledger")
    made = trainer(strategy, callbacks=[FINDERS[what]()] if how == "callback" else [])
    search = made.fit if how == "callback" else partial(TUNERS[what], Tuner(made))
    with pytest.raises(ConfigurationError, match="without noise; find the setting on public data"):
        search(module)
    assert module.trained == 0 and server.status().members == ()
    assert not (tmp_path / "anna.ledger").exists()


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_beside_noise_on_the_update_a_search_is_part_of_local_training(url: str, how: str) -> None:
    """Whatever learning rate it finds, what leaves is clipped and noised after; the search costs nothing."""
    server, ledger = add_server(url), Ledger(None)
    privacy = ParticipantLevel(noise_multiplier=1.0, delta=1e-5, clip=0.1)
    seen: list[int] = []
    strategy = DSSGDStrategy(url, "anna", privacy=privacy, ledger=ledger)
    made, module, _ = tuned(strategy, "lr", how, "step", lambda: seen.append(len(ledger.events())))
    assert module.lr != 0.1 and seen and not any(seen)
    assert len(ledger.events()) == len(rounds(made)) == server.status().uploads == 4
