"""Validation beside rounds: it moves none, sees what was trained, and exchanges nothing."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
from strategy_harness import (
    Tiny,
    add_server,
    everything,
    flat,
    loader,
    one_thread,
    require_close,
    trainer,
    url,
)
from trainer_harness import At, require_left, require_plain, run

from lightning_ppdl import DSSGDStrategy, RoundRobin, connect
from lightning_ppdl.errors import TurnTimeoutError

__all__ = ["one_thread", "url"]


def values(_: Any, module: pl.LightningModule) -> Any:
    return flat(module)


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_val_batches": 0},
        {"limit_val_batches": 0.5, "num_sanity_val_steps": -1},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 3},
        {"val_check_interval": 0.25},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
    ],
)
def test_when_is_validated_moves_no_round(url: str, settings: dict[str, Any]) -> None:
    assert require_plain(url, {"round_length": 5}, **settings).ends == [5, 10, 15, 18]


class Passing:
    """Another participant, that takes the turn whenever it is its own, and passes it on."""

    def __init__(self, url: str) -> None:
        self._backend = connect(url)

    def join(self, made: pl.Trainer, _: Any) -> None:
        if made.current_epoch == 0:
            self._backend.join("ben", self._backend.export()[0])

    def had_the_turn(self, made: pl.Trainer, _: Any) -> tuple[int, bool]:
        try:
            self._backend.take_turn(0.0)
        except TurnTimeoutError:
            return made.global_step, False
        self._backend.end_turn()
        return made.global_step, True


def test_validation_in_the_middle_of_a_round_sees_what_was_trained_and_keeps_the_turn(url: str) -> None:
    server = add_server(url, protocol=RoundRobin(), lease_seconds=1000.0)
    plain, own = At("on_validation_start", values), At("on_validation_start", values)
    ben = Passing(url)
    comes, looks = At("on_train_epoch_start", ben.join), At("on_validation_start", ben.had_the_turn)
    settings: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 0, "epochs": 2}
    run(callbacks=lambda: [plain], **settings)
    strategy = everything(url, round_length=4, turn_timeout_seconds=5.0)
    run(strategy, lambda: [own, comes, looks], **settings)
    for ours, theirs in zip(own.seen, plain.seen, strict=True):
        require_close(ours, theirs)
    assert looks.seen == [(2, False), (4, True), (6, False), (8, True), (10, False), (12, True)]
    assert [member.rounds for member in server.status().members] == [3, 0]


def test_the_sanity_check_exchanges_nothing_and_sees_the_modules_own_parameters(url: str) -> None:
    server = add_server(url, protocol=RoundRobin())
    sanity = At("on_sanity_check_end", lambda _, module: (server.status(), flat(module)))
    module = Tiny(lr=0.0)
    before = flat(module)
    strategy = DSSGDStrategy(url, "anna", initial=3)
    made = trainer(strategy, callbacks=[sanity], num_sanity_val_steps=2)
    made.fit(module, loader(), loader(2))
    ((status, checked),) = sanity.seen
    assert status.members == () and status.parameters == 0
    assert (checked == before).all() and not (flat(module) == before).any()
    require_left(server, 3)
