"""validate, test and predict are a participant's own affair: they ask nothing of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy_harness import (
    Tiny,
    add_server,
    everything,
    flat,
    loader,
    momenta,
    one_thread,
    require_alike,
    require_close,
    rounds,
    trainer,
    url,
)
from torch import Tensor, nn
from trainer_harness import Calls, require_left, watched

from lightning_ppdl import DSSGDStrategy, RecordLevel, RoundRobin
from lightning_ppdl.errors import ServerUnavailableError

__all__ = ["one_thread", "url"]

NOBODY = "grpc://127.0.0.1:9"
STAGES = ["validate", "test", "predict"]


class Evaluated(Tiny):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]


def evaluate(made: Any, module: Tiny, stage: str, **settings: Any) -> Any:
    """What the stage returns."""
    if stage != "predict":
        settings["verbose"] = False
    return getattr(made, stage)(module, loader(2), **settings)


@pytest.mark.parametrize("stage", STAGES)
def test_where_no_server_runs(stage: str) -> None:
    """It cannot even be reached, and no one waits for it."""
    module = Evaluated()
    made = trainer(everything(NOBODY, on_unreachable="fail"))
    require_alike(evaluate(made, module, stage), evaluate(trainer(), Evaluated(), stage))
    with pytest.raises(ServerUnavailableError):
        made.fit(module, loader())


@pytest.mark.parametrize("stage", STAGES)
def test_while_somebody_else_has_the_turn(url: str, stage: str) -> None:
    server = add_server(url, protocol=RoundRobin(), lease_seconds=1000.0)
    ben = Calls(url)
    made = trainer(everything(url, turn_timeout_seconds=0.5), 1)
    made.fit(Evaluated(), loader())
    before = server.parameters()
    ben.join("ben", ben.export()[0])
    ben.take_turn(0.5)
    evaluate(made, Evaluated(), stage)
    assert [(member.name, member.present) for member in server.status().members] == [
        ("anna", False),
        ("ben", True),
    ]
    assert server.status().awaited == ("ben",)
    assert (server.parameters() == before).all()


@pytest.mark.parametrize("stage", STAGES)
def test_between_two_fits(url: str, stage: str) -> None:
    """It evaluates the local parameters, and the rounds go on as they would have without it."""

    def two_fits(address: str, between: bool) -> tuple[Any, Evaluated, list[str]]:
        calls, module = Calls(address), Evaluated()
        made = trainer(watched(calls, 0.5), 2)
        made.fit(module, loader())
        if between:
            trained, made_before = flat(module), list(calls.made)
            expected = evaluate(trainer(), module, stage)
            require_alike(evaluate(made, module, stage), expected)
            assert torch.equal(flat(module), trained)
            assert calls.made == made_before
        made.fit_loop.max_epochs = 4
        made.fit(module, loader())
        return made, module, calls.made

    server = add_server(url)
    add_server(f"{url}-without")
    made, module, calls = two_fits(url, True)
    expected, expected_module, expected_calls = two_fits(f"{url}-without", False)
    assert calls == expected_calls
    require_left(server, 4)
    require_close(flat(module), flat(expected_module))
    require_alike(momenta(made), momenta(expected))


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_checkpoint_and_training_on(url: str, tmp_path: Path, stage: str) -> None:
    """An older checkpoint's parameters are evaluated; its rounds are history, and the next one is shared."""
    server = add_server(url)
    calls, module = Calls(url), Evaluated()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    made = trainer(watched(calls), 3, callbacks=[best], enable_checkpointing=True)
    made.fit(module, loader(), loader(2))
    assert "epoch=0" in best.best_model_path
    expected = evaluate(trainer(), Evaluated(), stage, ckpt_path=best.best_model_path)
    before = list(calls.made)
    require_alike(evaluate(made, module, stage, ckpt_path="best"), expected)
    assert calls.made == before
    made.fit_loop.max_epochs = 6
    made.fit(module, loader(), loader(2))
    assert [report.round for report in rounds(made)] == [1, 2, 3, 4, 5, 6]
    require_left(server, 6)
    require_close(server.parameters(), flat(module))


@pytest.mark.parametrize("stage", STAGES)
def test_under_a_mechanism_no_ledger_is_opened(url: str, tmp_path: Path, stage: str) -> None:
    server = add_server(url)
    privacy = RecordLevel(noise_multiplier=1.0, delta=1e-3)
    made = trainer(DSSGDStrategy(url, "anna", privacy=privacy, ledger=tmp_path / "anna.ledger"))
    evaluate(made, Evaluated(), stage)
    assert list(tmp_path.iterdir()) == []
    assert server.status().members == ()
