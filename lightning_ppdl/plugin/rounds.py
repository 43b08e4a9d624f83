"""The mixin that makes a Lightning callback open and close a participant's rounds, and hold its state."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.participant import Participant
from lightning_ppdl.plugin import generators
from lightning_ppdl.plugin.display import show, tell
from lightning_ppdl.plugin.guarantee import check_history, check_trainer, remember_noiseless
from lightning_ppdl.plugin.packages import callbacks_of, mismatch, package_name, package_of
from lightning_ppdl.plugin.ranks import Ranks
from lightning_ppdl.plugin.seat import Seat, Told
from lightning_ppdl.plugin.settings import Settings
from lightning_ppdl.privacy.mechanism import Exhausted
from lightning_ppdl.round_report import RoundReport

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback as _Callback
else:
    _Callback = object


@runtime_checkable
class CollaboratingStrategy(Protocol):
    """What rounds need of the Trainer's strategy; :class:`~lightning_ppdl.DSSGDStrategy` has it."""

    settings: Settings

    def enrol(self, layout: ParameterLayout) -> Participant:
        """A participant that shares what ``layout`` names, not joined yet."""

    def make_ranks(self) -> Ranks:
        """The processes that train this participant; all of them have to call this."""

    def go_local(self) -> None:
        """From here on nothing is released, and training goes on without noise."""


class Rounds(_Callback):
    """When rounds begin and end; see :class:`~lightning_ppdl.DSSGDCallback`.

    All ranks run it alike. What only rank zero may do stands in :class:`Seat`, and is reached through
    :meth:`Ranks.zero`, which all ranks call.

    It stands before the other callbacks, since these may replace the parameters, or save them: weight
    averaging puts its averages into the module when training ends, and a ModelCheckpoint that saves at a
    round's end saves it as one that is over. After an error the turn is given back first of all: Lightning
    leaves the rest out where another callback fails too.
    """

    def __init__(self) -> None:
        self.reports: list[RoundReport] = []
        self._trainer: pl.Trainer | None = None
        self._seat: Seat | None = None
        self._layout: ParameterLayout | None = None
        self._ranks: Ranks | None = None
        self._state: dict[str, Any] | None = None
        self._generators: dict[str, Any] | None = None
        self._loaders = 0
        self._steps_before_round = 0
        self._batches = 0
        self._reopened: dict[str, int] | None = None
        self._warned = False
        self._open = False
        self._alone = False
        self._in_flight = False
        self._noiseless = False
        self._stage = ""
        self._kept: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, CollaboratingStrategy):
            raise ConfigurationError(
                f"DSSGDCallback needs Trainer(strategy=DSSGDStrategy(...)), not "
                f"{type(trainer.strategy).__name__}"
            )
        if package_name(self) != package_name(trainer):
            raise ConfigurationError(f"callbacks={[self]!r}: {mismatch(self)}")
        self._strategy = trainer.strategy
        self._trainer = trainer
        self._stage = stage

    def restore_generators(self, trainer: pl.Trainer, loader: object) -> None:
        """Called with each loader that the Trainer is going to use: train loaders come before others.

        Not later, since they are about to be drawn from. Other ranks have streams of their own, which no
        checkpoint of rank zero knows.
        """
        if self._generators is None or trainer.state.fn != "fit" or not trainer.training:
            return
        if trainer.is_global_zero:
            generators.restore_generators(self._generators, trainer.strategy.root_device)
        generators.restore_loader(self._generators, self._loaders, loader)
        self._loaders += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy, settings = self._strategy, self._strategy.settings
        self._generators, self._loaders = None, 0
        self._warned = self._open = self._alone = self._in_flight = False
        if settings.quantity == "gradient" and any(isinstance(o, LBFGS) for o in trainer.optimizers):
            raise ConfigurationError(
                "quantity='gradient' does not fit LBFGS, which evaluates several gradients a step; share "
                "quantity='change'"
            )
        self._layout = ParameterLayout(pl_module, settings.share, settings.share_buffers)
        self._ranks = strategy.make_ranks()
        told = self._ranks.zero(partial(self._enter, trainer, pl_module, self._layout))
        if settings.privacy is None or settings.privacy.unit != "record":
            self._remember_noiseless(pl_module)
        if told.ends is not None:
            self._spend_no_more(trainer, told.ends)

    def _enter(self, trainer: pl.Trainer, module: pl.LightningModule, layout: ParameterLayout) -> Told:
        participant = self._strategy.enrol(layout)
        self._seat = seat = Seat(participant, layout, self._strategy.settings, self.reports)
        participant.listen(partial(tell, trainer))
        if self._state is not None:
            seat.load_state_dict(self._state)
        account = participant.account
        if account is not None:
            check_trainer(trainer, account)
            if account.mechanism.unit == "record":
                check_history(module, layout, account, self._noiseless)
        return seat.enter(module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._open:
            if self._in_flight and self._steps(trainer) >= self._strategy.settings.overlap_steps:
                self._settle(trainer)
            return
        if self._alone or _only_averages(trainer):
            return
        ranks, layout = self._joined()
        told = ranks.zero(lambda: self._require_seat().begin())
        if told.ends is not None:
            self._spend_no_more(trainer, told.ends)
            return
        self._follow(told)
        self._open = True
        self._steps_before_round, self._batches = trainer.global_step, 0
        if self._reopened is not None and not told.assigned:
            self._steps_before_round -= self._reopened["steps"]
            self._batches = self._reopened["batches"]
        self._reopened = None
        self._warn_of_unshared(layout)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._seat is None or self._strategy.settings.quantity != "gradient" or not self._seat.in_round:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and _overflowed(parameters):
            return  # the scaler is about to skip this step
        factor = 1.0
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            factor = 1 / scaler.get_scale()  # fused optimizers take it off in their step: here it is still on
        self._seat.add_gradients(parameters, factor)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._open:
            return
        self._batches += 1
        length = self._strategy.settings.round_length
        complete = trainer.is_last_batch if length == "epoch" else self._steps(trainer) >= length
        # Private steps may use up the budget in the middle of a round; then it ends there.
        if complete or (self._seat is not None and self._seat.steps_exhausted):
            self._end_round(trainer, on_step=True)
        elif self._seat is not None:
            self._seat.keep_turn()

    def on_validation_batch_end(self, *_: Any) -> None:
        # Validation in the middle of a round may well take longer than the turn's lease.
        if self._seat is not None:
            self._seat.keep_turn()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A round that no batch has ended: of an epoch that was cut short (max_steps, a timer, a batch-start
        # hook returning -1), or one of n steps where nothing is trained from here on.
        if self._open and (
            self._strategy.settings.round_length == "epoch" or _only_averages(trainer, from_next_epoch=True)
        ):
            self._end_round(trainer, on_step=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Training that stops in the middle of a round of n steps still shares what it did.
        if self._open:
            self._end_round(trainer, on_step=None)
        if self._in_flight:
            self._settle(trainer)
        if self._seat is not None and (account := self._seat.account) is not None:
            rank_zero_info(f"the ledger of participant {account.participant!r}: {account.spent()}")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # A checkpoint that another callback saves yet has the open round all the same.
        try:
            kept = self.state_dict()
        finally:
            self.leave()
        self._kept = kept

    def _end_round(self, trainer: pl.Trainer, on_step: bool | None) -> None:
        ranks, _ = self._joined()
        self._open = False
        if not self._batches:
            if self._seat is not None:
                self._seat.abandon()
            return
        if self._in_flight:
            self._settle(trainer)
        logged = bool(trainer.loggers) or trainer.progress_bar_callback is not None
        told = ranks.zero(lambda: self._require_seat().finish(logged))
        self._in_flight = told.in_flight
        show(trainer, told.metrics, on_step, to_loggers=ranks.is_zero)
        if told.ends is not None:
            self._spend_no_more(trainer, told.ends)

    def _settle(self, trainer: pl.Trainer) -> None:
        """Have the exchange end that is on its way."""
        ranks, _ = self._joined()
        self._in_flight = False
        told = ranks.zero(lambda: self._require_seat().settle())
        self._follow(told)
        show(trainer, told.metrics, None, to_loggers=ranks.is_zero)

    def _follow(self, told: Told) -> None:
        """Take over what rank zero was told to begin with."""
        ranks, layout = self._joined()
        if told.assigned and ranks.several:
            layout.assign(ranks.share(layout.flatten()))

    def _spend_no_more(self, trainer: pl.Trainer, how: Exhausted) -> None:
        """The budget is spent: end training, or let it go on without exchanges and without noise."""
        if how == "stop":
            trainer.should_stop = True
            return
        self._remember_noiseless(trainer.lightning_module)
        self._alone = True
        self._strategy.go_local()

    def leave(self) -> None:
        """Leave the collaboration, keeping the state with which a later ``fit()`` comes back."""
        if self._seat is not None:
            seat, self._seat = self._seat, None
            self._state = seat.state_dict(open_round=False)
            seat.leave()
        self._reopened = self._kept = None
        if self._ranks is not None:
            self._ranks.close()
        self._layout = self._ranks = None

    def state_dict(self) -> dict[str, Any]:
        if self._kept is not None:
            return self._kept
        seat, trainer = self._seat, self._trainer
        state: dict[str, Any] = {
            "noiseless": self._noiseless,
            "participant": self._state if seat is None else seat.state_dict(open_round=True),
        }
        if trainer is None:
            return state
        if self._open and seat is not None and seat.in_round:
            state["open"] = {"batches": self._batches, "steps": self._steps(trainer)}
        train = trainer.train_dataloader
        loaders = [] if train is None else package_of(trainer).utilities.CombinedLoader(train).flattened
        state["generators"] = generators.generators_state(trainer.strategy.root_device, loaders)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":
            return  # validating a checkpoint does not make this participant the one that it was then
        self._state, self._noiseless = state_dict["participant"], state_dict["noiseless"]
        self._reopened, self._generators = state_dict.get("open"), state_dict.get("generators")

    def loaded_from(self, module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """The parameters of ``checkpoint`` were put into ``module``, in whatever stage."""
        kept = checkpoint.get("callbacks", {}).get(self.state_key)
        # One that does not say so may have been trained in any way.
        if kept is None or kept["noiseless"]:
            remember_noiseless(module)

    def _remember_noiseless(self, module: pl.LightningModule) -> None:
        self._noiseless = True
        remember_noiseless(module)

    def _warn_of_unshared(self, layout: ParameterLayout) -> None:
        if not self._warned and (late := layout.trainable_but_not_shared()):
            self._warned = True
            rank_zero_warn(
                f"{len(late)} parameters, {late[0]!r} first, became trainable after this participant joined "
                f"and stay local: what is shared is settled at the start of fit(). Unfreeze them before "
                f"fit(), or in a fit() of their own with another server name"
            )

    def _steps(self, trainer: pl.Trainer) -> int:
        return trainer.global_step - self._steps_before_round

    def _joined(self) -> tuple[Ranks, ParameterLayout]:
        assert self._ranks is not None and self._layout is not None, "on_train_start() has run"
        return self._ranks, self._layout

    def _require_seat(self) -> Seat:
        assert self._seat is not None, "on rank zero, after on_train_start()"
        return self._seat


def _only_averages(trainer: pl.Trainer, from_next_epoch: bool = False) -> bool:
    """Whether this epoch trains nothing: after the last one StochasticWeightAveraging passes over the data
    once more, with averaged parameters, to refresh what batch norms keep."""
    epoch = trainer.current_epoch + from_next_epoch
    return any(epoch > average.swa_end for average in callbacks_of(trainer, "StochasticWeightAveraging"))


def _overflowed(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether a gradient is not finite."""
    gradients = (p.grad._values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None)
    return not all(torch.isfinite(gradient).all() for gradient in gradients)
