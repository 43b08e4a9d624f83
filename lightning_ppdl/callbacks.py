"""The callback that runs a participant's rounds inside a Trainer, and holds its state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakSet

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_ppdl.errors import BudgetExhaustedError, ConfigurationError, TaintedStateError
from lightning_ppdl.initial import Initial, initial_vector
from lightning_ppdl.layout import ParameterLayout, Share
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.records import Quantity
from lightning_ppdl.round_report import RoundReport

log = logging.getLogger(__name__)

# Modules that were trained in this process without record-level noise: what follows from them is no
# post-processing of private steps. A checkpoint says so of the modules of other processes.
_noiseless_modules: WeakSet[pl.LightningModule] = WeakSet()

_ON_PROGRESS_BAR = ("ppdl/round", "ppdl/uploaded_bytes", "ppdl/staleness", "ppdl/alone", "ppdl/epsilon")


@runtime_checkable
class CollaboratingStrategy(Protocol):
    """What the callback needs of the Trainer's strategy; :class:`~lightning_ppdl.DSSGDStrategy` has it."""

    privacy: Mechanism | None
    quantity: Quantity
    share: Share
    share_buffers: str | Sequence[str] | None
    initial: Initial
    round_length: int | Literal["epoch"]

    @property
    def server_url(self) -> str:
        """The server's address."""

    def go_local(self) -> None:
        """From here on nothing is released, and training goes on without noise."""

    def make_participant(self, layout: ParameterLayout) -> Participant:
        """A participant that shares what ``layout`` names, not joined yet."""


class DSSGDCallback(pl.Callback):
    """Opens a round before its first batch and closes it after its last one.

    :class:`~lightning_ppdl.DSSGDStrategy` attaches one if the user has not. A round begins (turn,
    download) at ``on_train_batch_start`` and ends (release, upload) at ``on_train_batch_end``, before
    validation and checkpoints; so both see the participant's own parameters after local training. An
    epoch that is cut short ends its round at ``on_train_epoch_end``.

    A round for which the server cannot be reached may be trained alone; what it waits for, and for how
    long, is written above the progress bar.

    After each round it logs, as ``ppdl/...`` to every logger and in part to the progress bar, ``alone`` (1
    for such a round, else 0) and, of a round that was shared, the fields of
    :class:`~lightning_ppdl.round_report.RoundReport`, whatever ``log_every_n_steps`` is; under a privacy
    mechanism also ``epsilon``, the ledger's total, and ``epsilon_remaining``.

    Where the next round, or the next private step, would bring the ledger's total beyond the budget,
    training stops, or goes on alone: as the mechanism's ``on_exhausted`` says.

    Attributes:
        reports: One report a round, of this process.
    """

    def __init__(self) -> None:
        self.reports: list[RoundReport] = []
        self._participant: Participant | None = None
        self._layout: ParameterLayout | None = None
        self._state: dict[str, Any] | None = None
        self._steps_before_round = 0
        self._batches = 0
        self._warned = False
        self._open = False
        self._alone = False
        self._noiseless = False
        self._resumed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, CollaboratingStrategy):
            raise ConfigurationError(
                f"DSSGDCallback needs Trainer(strategy=DSSGDStrategy(...)), not "
                f"{type(trainer.strategy).__name__}"
            )
        self._strategy = trainer.strategy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = self._strategy
        self._layout = ParameterLayout(pl_module, strategy.share, strategy.share_buffers)
        self._participant = strategy.make_participant(self._layout)
        self._participant.listen(partial(_tell, trainer))
        if strategy.quantity == "gradient" and any(isinstance(o, LBFGS) for o in trainer.optimizers):
            raise ConfigurationError(
                "quantity='gradient' does not fit LBFGS, which evaluates several gradients a step; share "
                "quantity='change'"
            )
        if self._state is not None:
            self._participant.load_state_dict(self._state)
        self._warned = self._open = self._alone = False
        account = self._participant.account
        if account is not None:
            self._check_private(trainer, pl_module, account)
            if self._participant.exhausted:
                self._spend_no_more(trainer, account, before_training=True)
        if strategy.privacy is None or strategy.privacy.unit != "record":
            self._remember_noiseless(pl_module)
        if self._alone:
            return
        if self._participant.join():
            if self._participant.round and isinstance(strategy.initial, int):
                raise ConfigurationError(
                    f"this participant continues after round {self._participant.round}, but "
                    f"{strategy.server_url} is new and has no parameters: with initial={strategy.initial!r} "
                    f"all training so far would be thrown away. Give initial='own' to start it from this "
                    f"participant's parameters (they leave this machine un-noised; refused beside a privacy "
                    f"mechanism), a file, or begin anew with a new strategy and no ckpt_path"
                )
            vector = initial_vector(strategy.initial, pl_module, self._layout)
            taken = self._participant.offer_initial(vector)
            rank_zero_info(
                f"{strategy.server_url} had no parameters yet and starts from "
                f"{_source(strategy.initial) if taken else 'what another participant offered first'}"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        participant, layout = self._joined()
        if not self._open and not self._alone:
            if participant.account is not None and participant.exhausted:
                self._spend_no_more(trainer, participant.account)
                return
            start = participant.begin_round(layout.flatten())
            if start is not None:
                layout.assign(start)
                if not layout.exact:
                    participant.started_from(layout.flatten())
            self._open = True
            self._steps_before_round = trainer.global_step
            self._batches = 0
            self._warn_of_unshared(layout)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        participant, layout = self._joined()
        if self._strategy.quantity != "gradient" or not participant.in_round:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if _loss_scale_overflowed(trainer, parameters):
            return
        layout.add_gradients(participant.gradients, parameters)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        participant, _ = self._joined()
        if not self._open:
            return
        self._batches += 1
        length = self._strategy.round_length
        complete = trainer.is_last_batch if length == "epoch" else self._steps(trainer) >= length
        # Private steps may use up the budget in the middle of a round; then it ends there.
        if complete or participant.exhausted:
            self._end_round(trainer, on_step=True)
            # Going on alone is for the next batch to decide, if there is one.
            account = participant.account
            if account is not None and participant.exhausted and account.mechanism.on_exhausted == "stop":
                self._spend_no_more(trainer, account)
        elif participant.in_round:
            participant.keep_turn()

    def on_validation_batch_end(self, *_: Any) -> None:
        # Validation in the middle of a round may well take longer than the turn's lease.
        if self._participant is not None and self._participant.in_round:
            self._participant.keep_turn()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only an epoch cut short (max_steps, a timer, a batch-start hook returning -1) gets here
        # with its round open.
        if self._open and self._strategy.round_length == "epoch":
            self._end_round(trainer, on_step=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Training that stops in the middle of a round of n steps still shares what it did.
        participant, _ = self._joined()
        if self._open:
            self._end_round(trainer, on_step=None)
        if participant.account is not None:
            rank_zero_info(f"the ledger of participant {participant.name!r}: {participant.account.spent()}")

    def _check_private(self, trainer: pl.Trainer, module: pl.LightningModule, account: Account) -> None:
        """Refuse what would void a mechanism's guarantee, before anything leaves."""
        privacy = account.mechanism
        if not privacy.public_validation and any(
            isinstance(callback, EarlyStopping)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ):
            raise ConfigurationError(
                "EarlyStopping decides by a metric without noise how much is released; leave it out, or "
                "declare the validation data public with public_validation=True"
            )
        if privacy.max_epsilon is not None and privacy.on_exhausted == "stop":
            for name in ("min_epochs", "min_steps"):
                if getattr(trainer, name):
                    raise ConfigurationError(
                        f"{name}={getattr(trainer, name)!r}: the budget max_epsilon={privacy.max_epsilon!r} "
                        f"may have to end training earlier; leave it out, or give on_exhausted='local'"
                    )
        if privacy.unit != "record":
            return
        account.require_untainted()
        unknown = trainer.ckpt_path is not None and not self._resumed
        if self._noiseless or unknown or module in _noiseless_modules:
            raise TaintedStateError(
                "this module, or the checkpoint it continues from, was trained without noise, or by a "
                "Trainer that kept no record of it: what follows from it cannot be released at the level of "
                "records. Begin with a new module, and continue only from checkpoints of record-level "
                "training"
            )
        shared = {spec.name for spec in self._joined()[1].specs}
        local = [name for name, p in module.named_parameters() if p.requires_grad and name not in shared]
        if local:
            rank_zero_warn(
                f"{len(local)} trainable parameters, {local[0]!r} first, stay local and keep the values that "
                f"they have now: the guarantee needs these to come from no private data, or from private "
                f"steps only"
            )

    def _remember_noiseless(self, module: pl.LightningModule) -> None:
        self._noiseless = True
        _noiseless_modules.add(module)

    def _spend_no_more(self, trainer: pl.Trainer, account: Account, before_training: bool = False) -> None:
        """The budget is spent: end training, or let it go on without exchanges and without noise."""
        privacy = account.mechanism
        spent = f"max_epsilon={privacy.max_epsilon!r} allows no further release of privacy={privacy.name!r}"
        if privacy.on_exhausted == "local":
            rank_zero_warn(f"{spent}: training goes on without exchanging, and without noise")
            account.taint("its budget was spent, and on_exhausted='local'")
            self._remember_noiseless(trainer.lightning_module)
            self._alone = True
            self._strategy.go_local()
        elif before_training:
            raise BudgetExhaustedError(
                f"{spent}: the ledger holds {account.spent()}. Raise max_epsilon if whoever answers for the "
                f"data agrees, or give on_exhausted='local' to train alone"
            )
        else:
            rank_zero_info(f"{spent}: training ends")
            trainer.should_stop = True

    def leave(self) -> None:
        """Leave the collaboration, keeping the state with which a later ``fit()`` comes back."""
        if self._participant is not None:
            self._state = self._participant.state_dict()
            self._participant.leave()
            self._participant = self._layout = None

    def state_dict(self) -> dict[str, Any]:
        state = self._state if self._participant is None else self._participant.state_dict()
        return {"noiseless": self._noiseless, "participant": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._noiseless = state_dict["participant"], state_dict["noiseless"]
        self._resumed = True

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

    def _joined(self) -> tuple[Participant, ParameterLayout]:
        assert self._participant is not None and self._layout is not None, "on_train_start() has run"
        return self._participant, self._layout

    def _end_round(self, trainer: pl.Trainer, on_step: bool | None) -> None:
        participant, layout = self._joined()
        self._open = False
        if not self._batches:
            participant.abandon_round()
            return
        metrics = {"ppdl/alone": float(not participant.in_round)}
        if participant.in_round:
            report = participant.end_round(layout.flatten())
            self.reports.append(report)
            metrics |= {f"ppdl/{name}": float(value) for name, value in asdict(report).items()}
        if participant.account is not None and (trainer.loggers or trainer.progress_bar_callback is not None):
            metrics |= {f"ppdl/{name}": value for name, value in participant.account.metrics().items()}
        # Lightning drops on-step metrics of steps that log_every_n_steps passes over, and a round may
        # well end on such a step; so the loggers are written to directly.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        # A self.log costs more than a training step of a small model; it is for eyes on the bar.
        if on_step is not None and trainer.progress_bar_callback is not None:
            for key in _ON_PROGRESS_BAR:
                if key not in metrics:
                    continue
                trainer.lightning_module.log(
                    key,
                    metrics[key],
                    prog_bar=True,
                    logger=False,
                    on_step=on_step,
                    on_epoch=not on_step,
                )


def _tell(trainer: pl.Trainer, line: str) -> None:
    """A line for the user, above the progress bar where there is one."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(line)
    else:
        log.warning("%s", line)


def _loss_scale_overflowed(trainer: pl.Trainer, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether fp16 loss scaling is about to skip this step because a gradient overflowed."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return False
    return not all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)


def _source(initial: Initial) -> str:
    if initial == "own":
        return "this module's own parameters, which left this machine un-noised (initial='own')"
    if isinstance(initial, int):
        return (
            f"public seed {initial}, not from this module's values (initial='own' or a file would keep "
            f"pretrained ones)"
        )
    return f"the file {initial}"
