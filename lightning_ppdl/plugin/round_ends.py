"""Where rounds end: before any other callback, which may replace the parameters, or save them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_ppdl.plugin.rounds import Rounds

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback as _Callback
else:
    _Callback = object


class RoundEnds(_Callback):
    """Stands before the other callbacks, and ends the rounds that :class:`Rounds` begins behind them.

    What is shared is what was trained: weight averaging puts its averages into the module when training
    ends, and a ModelCheckpoint that saves at a round's end saves it as one that is over. After an error the
    turn is given back first of all, since Lightning leaves the rest out where another callback fails too.

    Args:
        rounds: Of the same Trainer.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._rounds.end_of_batch(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rounds.end_of_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rounds.end_of_training(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._rounds.leave_early()
