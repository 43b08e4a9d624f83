"""Training that ends early, late or in the middle: where the last round ends, and with what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer
from strategy_harness import Tiny, add_server, everything, loader, one_thread, rounds, trainer, url
from trainer_harness import At, require_free, require_plain

from lightning_ppdl import DSSGDStrategy, ParticipantLevel, RecordLevel
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.mechanism import Mechanism

__all__ = ["one_thread", "url"]


def early(**settings: Any) -> Callable[[], list[Callback]]:
    """Stops at the first look."""
    return lambda: [EarlyStopping("val_loss", **{"stopping_threshold": 10.0, **settings})]


def stop_at(step: int) -> Callable[[], list[Callback]]:
    """As a callback of the user's does."""

    def look(made: pl.Trainer, _: Any) -> None:
        made.should_stop = made.should_stop or made.global_step == step

    return lambda: [At("on_train_batch_end", look)]


@pytest.mark.parametrize(
    ("round_length", "callbacks", "settings", "ends"),
    [
        (4, early(), {}, [4, 6]),
        ("epoch", early(), {"min_epochs": 2}, [6, 12]),
        (4, early(), {"min_steps": 9}, [4, 8, 9]),
        ("epoch", early(), {"val_check_interval": 2}, [2]),
        (4, early(), {"val_check_interval": 5}, [4, 5]),
        (4, early(), {"val_check_interval": 4}, [4]),
        (4, early(), {"val_check_interval": 0.5, "check_val_every_n_epoch": 2}, [4, 8, 9]),
        (4, early(check_on_train_epoch_end=True), {"val_check_interval": 2}, [4, 6]),
        ("epoch", early(), {"epochs": -1}, [6]),
        (4, stop_at(3), {}, [3]),
        (4, stop_at(4), {}, [4]),
        ("epoch", stop_at(9), {"epochs": -1}, [6, 9]),
        (4, stop_at(5), {"min_epochs": 2}, [4, 8, 12]),
        ("epoch", list, {"epochs": -1, "max_steps": 8}, [6, 8]),
        (4, list, {"epochs": -1, "max_steps": 12}, [4, 8, 12]),
        (4, list, {"epochs": None, "max_steps": 3}, [3]),
        (4, list, {"epochs": 3, "overfit_batches": 2}, [4, 6]),
        ("epoch", list, {"epochs": 3, "overfit_batches": 2}, [2, 4, 6]),
    ],
)
def test_where_the_last_round_ends(
    url: str,
    round_length: Any,
    callbacks: Callable[[], list[Callback]],
    settings: dict[str, Any],
    ends: list[int],
) -> None:
    alone = require_plain(url, {"round_length": round_length}, callbacks, **{"epochs": 5, **settings})
    assert alone.ends == ends


@pytest.mark.parametrize(
    ("round_length", "timed", "settings", "ends"),
    [
        ("epoch", {"seconds": 9}, {}, [6, 9]),
        (4, {"seconds": 9}, {}, [4, 8, 9]),
        (4, {"seconds": 8}, {"min_epochs": 2}, [4, 8, 12]),
        (4, {"seconds": 8, "interval": "epoch"}, {}, [4, 8, 12]),
        ("epoch", {"seconds": 2}, {"accumulate_grad_batches": 2}, [2]),
    ],
)
def test_where_a_timer_ends_the_last_round(
    url: str,
    round_length: Any,
    timed: dict[str, Any],
    settings: dict[str, Any],
    ends: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = {"seconds": 0}
    clock = SimpleNamespace(monotonic=lambda: now["seconds"])
    monkeypatch.setattr("pytorch_lightning.callbacks.timer.time", clock)

    def tick(made: pl.Trainer, _: Any) -> None:
        now["seconds"] = made.global_step

    def callbacks() -> list[Callback]:
        now["seconds"] = 0
        duration = {"seconds": timed["seconds"]}
        return [At("on_train_batch_end", tick), Timer(duration, timed.get("interval", "step"))]

    alone = require_plain(url, {"round_length": round_length}, callbacks, epochs=5, **settings)
    assert alone.ends == ends
    require_free(url)


@pytest.mark.parametrize("settings", [{"limit_train_batches": 0}, {"epochs": 0}, {"max_steps": 0}])
def test_without_batches_nobody_joins(url: str, settings: dict[str, Any]) -> None:
    server = add_server(url)
    made = trainer(everything(url, turn_timeout_seconds=0.5), **settings)
    made.fit(Tiny(), loader(), loader(2))
    status = server.status()
    assert (status.members, status.parameters, rounds(made)) == ((), 0, [])


@pytest.mark.parametrize("batches", [True, 2])
def test_a_dev_run_shares_one_round(url: str, batches: Any) -> None:
    """It is there to find what does not work, and sharing is part of that."""
    assert require_plain(url, fast_dev_run=batches).ends == [int(batches)]


@pytest.mark.parametrize(
    "privacy",
    [RecordLevel(noise_multiplier=1.0, delta=1e-3, clip=1.0), ParticipantLevel(epsilon=8.0, delta=1e-5)],
    ids=lambda mechanism: mechanism.name,
)
def test_a_dev_run_leaves_the_budget_alone(url: str, tmp_path: Path, privacy: Mechanism) -> None:
    """A target would be calibrated to be spent on its batch, and the ledger is the data set's for good."""
    server = add_server(url)

    def strategy() -> DSSGDStrategy:
        return DSSGDStrategy(url, "anna", privacy=privacy, ledger=tmp_path / "anna.ledger")

    with suppress(ConfigurationError):
        trainer(strategy(), fast_dev_run=True).fit(Tiny(), loader())
    assert server.status().uploads == 0
    with Ledger(tmp_path / "anna.ledger") as ledger:
        assert list(ledger.events()) == []
    made = trainer(strategy(), epochs=2)
    made.fit(Tiny(), loader())
    assert len(rounds(made)) == 2 == server.status().uploads
