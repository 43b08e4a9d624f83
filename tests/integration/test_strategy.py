"""The drop-in with real Trainers: alone it is plain training, together it takes turns."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar
from pytorch_lightning.loggers import CSVLogger
from strategy_harness import (
    BATCHES,
    Tiny,
    add_server,
    everything,
    fit,
    flat,
    loader,
    momenta,
    require_close,
    rounds,
    trainer,
    url,
)

from lightning_ppdl import (
    DSSGDCallback,
    DSSGDStrategy,
    LargestValues,
    RoundRobin,
    ServerOptimizer,
    connect,
)

__all__ = ["url"]


def test_naming_the_strategy_is_enough(url: str) -> None:
    """Nobody configured a server; two epochs are two rounds of a tenth of the parameters each."""
    module = Tiny()
    strategy = DSSGDStrategy(server=url, participant="clinic-a")
    made = pl.Trainer(
        strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    made.fit(module, loader())
    status = connect(url).status()
    assert (status.version, status.parameters) == (2, len(flat(module)))
    assert [(m.name, m.present, m.rounds) for m in status.members] == [("clinic-a", False, 2)]
    assert [report.uploaded_fraction for report in rounds(made)] == [3 / 34, 3 / 34]
    assert status.uploaded_bytes == sum(report.uploaded_bytes for report in rounds(made))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"round_length": 1},
        {"round_length": 4},
        {"round_length": 100},
        {"accumulate_grad_batches": 4},
        {"accumulate_grad_batches": 4, "round_length": 1},
        {"gradient_clip_val": 0.05},
        {"limit_train_batches": 4},
        {"max_steps": 8},
        {"download_fraction": 0.3},
    ],
)
def test_alone_it_is_plain_training(url: str, settings: dict[str, Any]) -> None:
    """Momentum, schedule, dropout, the order of batches: nothing notices the rounds."""
    own = {key: settings[key] for key in ("round_length", "download_fraction") if key in settings}
    common = {key: value for key, value in settings.items() if key not in own}

    def run(strategy: Any) -> tuple[pl.Trainer, Tiny]:
        pl.seed_everything(5, verbose=False)
        module, made = Tiny(dropout=0.3), trainer(strategy, epochs=5, **common)
        made.fit(module, loader(shuffle=True))
        return made, module

    plain, expected = run("auto")
    made, module = run(everything(url, **own))
    assert made.global_step == plain.global_step > 0
    require_close(flat(module), flat(expected))
    require_close(connect(url).status().version, len(rounds(made)))
    assert made.optimizers[0].param_groups[0]["lr"] == plain.optimizers[0].param_groups[0]["lr"]
    for ours, theirs in zip(momenta(made), momenta(plain), strict=True):
        require_close(ours, theirs)


def test_the_server_has_what_a_lone_participant_has(url: str) -> None:
    server = add_server(url)
    module = Tiny()
    fit(module, everything(url))
    require_close(server.parameters(), flat(module))


def test_a_second_fit_goes_on_where_the_first_ended(url: str) -> None:
    whole, halves = Tiny(), Tiny()
    expected = fit(whole, everything(f"{url}-whole"), epochs=5)
    made = trainer(everything(url), epochs=2)
    made.fit(halves, loader())
    made.fit_loop.max_epochs = 5
    made.validate(halves, loader(), verbose=False)
    made.fit(halves, loader())
    assert torch.equal(flat(halves), flat(whole))
    assert all(torch.equal(a, b) for a, b in zip(momenta(made), momenta(expected), strict=True))
    assert made.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]
    assert [report.round for report in rounds(made)] == [1, 2, 3, 4, 5]


def test_another_module_gets_optimizers_of_its_own(url: str) -> None:
    made = trainer(everything(url), epochs=1)
    first, second = Tiny(), Tiny()
    made.fit(first, loader())
    made.fit_loop.max_epochs = 2
    made.fit(second, loader())
    ours = {id(p) for p in second.parameters()}
    assert {id(p) for group in made.optimizers[0].param_groups for p in group["params"]} == ours


@pytest.mark.parametrize("round_length", ["epoch", 4])
def test_sharing_gradients_with_the_same_optimizer_is_sharing_changes(url: str, round_length: Any) -> None:
    by_change, by_gradient = Tiny(momentum=0.0, lr=0.05), Tiny(momentum=0.0, lr=0.05)
    changes = add_server(f"{url}-change")
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    gradients = add_server(f"{url}-gradient", merge=ServerOptimizer(sgd))
    settings: dict[str, Any] = {"epochs": 2, "accumulate_grad_batches": 2}
    fit(by_change, everything(f"{url}-change", round_length=round_length), **settings)
    fit(
        by_gradient, everything(f"{url}-gradient", round_length=round_length, quantity="gradient"), **settings
    )
    require_close(gradients.parameters(), changes.parameters())
    require_close(flat(by_gradient), flat(by_change))
    assert np.abs(gradients.parameters() - flat(Tiny()).numpy()).max() > 0.01


def test_together_they_take_turns(url: str) -> None:
    names = ["anna", "ben", "cleo"]
    server = add_server(url, protocol=RoundRobin(), members=names)
    order: list[tuple[str, int]] = []
    failures: list[BaseException] = []

    class Watch(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == BATCHES - 1:
                order.append((self.name, server.version))

    def run(seed: int) -> None:
        try:
            watch = Watch(names[seed])
            strategy = DSSGDStrategy(url, names[seed], selection=LargestValues(0.5), turn_timeout_seconds=60)
            trainer(strategy, epochs=4, callbacks=[watch]).fit(Tiny(), loader(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == [] and not any(thread.is_alive() for thread in threads)
    assert order == [(name, version) for version, name in enumerate(names * 4)]
    assert [m.rounds for m in server.status().members] == [4, 4, 4]
    assert server.status().rejections == {}


class Seen(Callback):
    """The parameters that each validation evaluated."""

    def __init__(self) -> None:
        self.parameters: list[torch.Tensor] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.parameters.append(flat(pl_module))


def test_validation_and_checkpoint_see_the_same_parameters(url: str, tmp_path: Path) -> None:
    fit(Tiny(), DSSGDStrategy(url, "other", selection=LargestValues(0.5)), epochs=2)
    seen, keep = Seen(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    strategy = DSSGDStrategy(url, "anna", selection=LargestValues(0.5))
    module = Tiny()
    trainer(strategy, callbacks=[seen, keep], enable_checkpointing=True).fit(module, loader(1), loader(2))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == len(seen.parameters) == 3
    for file, parameters in zip(files, seen.parameters, strict=True):
        saved = torch.load(file, weights_only=False)["state_dict"]
        assert torch.equal(torch.cat([value.reshape(-1) for value in saved.values()]), parameters)
    assert torch.equal(flat(module), parameters)


def test_resuming_from_a_checkpoint_continues_the_rounds(url: str, tmp_path: Path) -> None:
    def strategy(address: str) -> DSSGDStrategy:
        return everything(address, selection=LargestValues(0.1))

    whole, first, module = Tiny(), Tiny(), Tiny()
    fit(whole, strategy(f"{url}-whole"), epochs=4)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    made = fit(first, strategy(url), epochs=2, callbacks=[keep], enable_checkpointing=True)
    resumed = trainer(strategy(url), epochs=4)
    resumed.fit(module, loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert [report.round for report in rounds(resumed)] == [3, 4]
    # What the checkpoint holds need not come again: three of 34 entries do, the ones of round 2.
    assert rounds(resumed)[0].downloaded_bytes < rounds(made)[0].downloaded_bytes / 2
    assert torch.equal(flat(module), flat(whole))


def test_resuming_at_a_new_server_starts_from_its_parameters(url: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(Tiny(), everything(url), epochs=2, callbacks=[keep], enable_checkpointing=True)
    server = add_server(f"{url}-new", initial=np.full(34, 0.5, np.float32))
    made = trainer(everything(f"{url}-new", selection=LargestValues(0.1)), epochs=3)
    made.fit(Tiny(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert [report.round for report in rounds(made)] == [3]
    assert np.count_nonzero(server.parameters() != 0.5) == 3


def test_metrics_reach_every_logger_and_the_progress_bar(url: str, tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = []

    class Bar(ProgressBar):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            shown.append(self.get_metrics(trainer, pl_module))

    logger = CSVLogger(tmp_path, name="", version="")
    settings: dict[str, Any] = {"logger": logger, "log_every_n_steps": 50, "callbacks": [Bar()]}
    made = fit(Tiny(), everything(url), **settings, enable_progress_bar=True)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    by_round = [row for row in rows if row["ppdl/round"]]
    assert [(float(row["ppdl/round"]), int(row["step"])) for row in by_round] == [(1, 6), (2, 12), (3, 18)]
    for row, report in zip(by_round, rounds(made), strict=True):
        for field in ("uploaded_bytes", "downloaded_bytes", "uploaded_fraction", "update_norm", "merged"):
            assert float(row[f"ppdl/{field}"]) == pytest.approx(float(getattr(report, field)))
    assert [bar["ppdl/round"] for bar in shown] == [1.0, 2.0, 3.0]
    assert all({"ppdl/uploaded_bytes", "ppdl/staleness"} <= set(bar) for bar in shown)


def test_the_users_callback_is_the_one_used(url: str) -> None:
    callback = DSSGDCallback()
    made = fit(Tiny(), everything(url), callbacks=[callback])
    assert [report.round for report in callback.reports] == [1, 2, 3]
    assert rounds(made) is callback.reports
    assert connect(url).status().uploads == 3


def interrupted(module: Tiny, when: Callable[[int], bool], error: BaseException) -> Tiny:
    steps = itertools.count()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        if when(next(steps)):
            raise error
        return step(batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_an_error_frees_the_turn(url: str, error: BaseException) -> None:
    server = add_server(url, protocol=RoundRobin(), lease_seconds=1000.0)
    module = interrupted(Tiny(), lambda step: step == 8, error)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, everything(url))
    assert [(m.name, m.present, m.rounds) for m in server.status().members] == [("anna", False, 1)]
    other = everything(url, "ben", turn_timeout_seconds=1)
    assert len(rounds(fit(Tiny(), other))) == 3
    again = fit(Tiny(), everything(url), epochs=1)
    assert rounds(again)[0].merged and server.status().members[0].rounds >= 2
