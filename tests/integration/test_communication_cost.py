"""A module that logs what its rounds cost, under a real Trainer: each epoch, in all, after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from strategy_harness import Tiny, add_server, loader, rounds, trainer, url

from lightning_ppdl import CommunicationCost, DSSGDStrategy
from lightning_ppdl.outbox import Outbox

__all__ = ["url"]


class Owner(Tiny):
    """As the docstring of CommunicationCost says."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = CommunicationCost()

    def on_train_epoch_start(self) -> None:
        self.cost.reset()

    def on_train_epoch_end(self) -> None:
        assert isinstance(self.trainer.strategy, DSSGDStrategy)
        self.cost.update(self.trainer.strategy.reports)
        self.log("communication", self.cost)
        self.log("communication_total", self.cost.total.float())

    def on_train_end(self) -> None:
        assert isinstance(self.trainer.strategy, DSSGDStrategy)
        self.cost.update(self.trainer.strategy.reports)


class Eager(Owner):
    """Hands over the reports at every step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(self.trainer.strategy, DSSGDStrategy)
        self.cost.update(self.trainer.strategy.reports)


class LeftToLightning(Owner):
    """Leaves resetting to Lightning."""

    def on_train_epoch_start(self) -> None:
        pass


class Kept(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(metrics)

    def of(self, key: str) -> list[int]:
        return [int(row[key]) for row in self.rows if key in row]


def fit(
    module: pl.LightningModule, url: str, ckpt_path: str | None = None, **settings: Any
) -> tuple[Kept, list[int]]:
    """What was logged, and the bytes of each round that this process shared."""
    kept = Kept()
    strategy = DSSGDStrategy(url, "anna", round_length=settings.pop("round_length", "epoch"))
    made = trainer(strategy, logger=kept, log_every_n_steps=1, **settings)
    made.fit(module, loader(), ckpt_path=ckpt_path)
    return kept, [report.uploaded_bytes + report.downloaded_bytes for report in rounds(made)]


@pytest.mark.parametrize("kind", [Owner, Eager, LeftToLightning])
def test_each_epochs_cost_and_the_running_total(url: str, kind: type[Owner]) -> None:
    server, module = add_server(url), kind()
    kept, sizes = fit(module, url, round_length=3)
    assert len(sizes) == 6 and min(sizes) > 0
    assert kept.of("communication") == [sum(sizes[i : i + 2]) for i in (0, 2, 4)]
    assert kept.of("communication_total") == [sum(sizes[:n]) for n in (2, 4, 6)]
    status = server.status()
    assert int(module.cost.total) == status.uploaded_bytes + status.downloaded_bytes


def test_a_last_short_round_is_in_the_total_though_no_epoch_is_left_for_it(url: str) -> None:
    add_server(url)
    module = Owner()
    kept, sizes = fit(module, url, round_length=4)
    assert len(sizes) == 5
    assert sum(kept.of("communication")) == sum(sizes[:4])
    assert int(module.cost.total) == sum(sizes)


def test_what_was_not_merged_was_sent_all_the_same(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_server(url)
    monkeypatch.setattr(Outbox, "send", lambda self, message: None)
    module = Owner()
    kept, sizes = fit(module, url)
    assert kept.of("ppdl/merged") == [0, 0, 0]
    assert kept.of("communication") == sizes
    up = kept.of("ppdl/uploaded_bytes")
    assert min(up) > 0 and int(module.cost.total) == sum(up) + sum(kept.of("ppdl/downloaded_bytes"))


def test_an_epoch_after_a_resume_is_logged_without_the_one_before(url: str, tmp_path: Path) -> None:
    server = add_server(url)
    saving = ModelCheckpoint(tmp_path, filename="saved", save_on_train_epoch_end=True)
    first, before = fit(Owner(), url, epochs=2, callbacks=[saving], enable_checkpointing=True)
    module = Owner()
    second, after = fit(module, url, str(tmp_path / "saved.ckpt"), epochs=4)
    assert (len(before), len(after)) == (2, 2)
    assert first.of("communication") + second.of("communication") == before + after
    status = server.status()
    assert int(module.cost.total) == sum(before + after) == status.uploaded_bytes + status.downloaded_bytes


def test_a_resume_in_the_middle_of_an_epoch_keeps_what_it_had_cost(url: str, tmp_path: Path) -> None:
    add_server(url)
    saving = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=10)
    settings: dict[str, Any] = {"callbacks": [saving], "enable_checkpointing": True, "round_length": 3}
    _, before = fit(Eager(), url, epochs=2, **settings)
    module = Eager()
    second, after = fit(module, url, str(tmp_path / "saved.ckpt"), epochs=3, round_length=3)
    # The third round was handed over before step 10; the fourth, in the first process only, after it.
    assert second.of("communication") == [before[2], sum(after)]
    assert len(after) == 2
    assert int(module.cost.total) == sum(before[:3] + after)
