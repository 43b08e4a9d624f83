"""The drop-in: a Lightning strategy that makes a module a participant of a collaboration."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.types import STEP_OUTPUT

from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.callbacks import DSSGDCallback
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.initial import Initial, check_initial
from lightning_ppdl.layout import ParameterLayout, Share
from lightning_ppdl.participant import OnUnreachable, Participant
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import NoiseSource, SecretNoise
from lightning_ppdl.privacy.record.record_level import PrivateStepsRelease, RecordLevel
from lightning_ppdl.privacy.release import PlainRelease, Release
from lightning_ppdl.private_training import PrivateTraining
from lightning_ppdl.records import Manifest, Quantity, ValueType
from lightning_ppdl.round_report import RoundReport
from lightning_ppdl.selection import LargestValues, Selection
from lightning_ppdl.validation import (
    require_choice,
    require_fraction,
    require_name,
    require_not_negative,
    require_positive,
    require_round_length,
)


class DSSGDStrategy(SingleDeviceStrategy):
    """Distributed selective SGD on one device: ``Trainer(strategy=DSSGDStrategy(...))``.

    Before each round the parameters are downloaded, after it the selected part of their change is
    uploaded; in between the Trainer trains as it always does. One ``fit()`` is the whole run, and a
    further ``fit()`` of the same module goes on with the same optimizers and schedulers.

    Args:
        server: Address of the parameter server, e.g. ``"memory://study"``, or a :class:`Backend`.
            None reads it from the environment variable ``PPDL_SERVER``.
        participant: This participant's name at the server. None reads it from ``PPDL_PARTICIPANT``.
        selection: Which entries of an update are uploaded; the largest tenth by default.
        bound: gamma: every uploaded value is clamped into [-bound, bound]; None for no bound.
        privacy: How releases are made differentially private: a
            :class:`~lightning_ppdl.privacy.mechanism.Mechanism`. None adds no noise and makes no claim.
        ledger: Where private releases are entered: the path of this data set's ledger, one for all runs
            and servers. None reads it from ``PPDL_LEDGER``. Only with ``privacy``.
        noise: Where noise and secret coins come from; None for the operating system's cryptographic
            source. A seeded one is for simulations.
        download_fraction: theta_d in (0, 1]: the share of the parameters downloaded before a round.
        round_length: ``"epoch"``, or a number of optimizer steps.
        quantity: ``"change"``: the change of the parameters over the round. ``"gradient"``: the sum
            of its gradients, unscaled and before clipping, for a server with an optimizer of its own.
        share: Which trainable parameters are shared: None for all, name patterns, or a predicate; see
            :class:`~lightning_ppdl.layout.ParameterLayout`.
        share_buffers: Name patterns of buffers to share too; by default buffers stay local.
        initial: What a server without parameters starts from: a public seed (an int), a
            ``.safetensors`` file, or ``"own"``, this module's parameters, which leave un-noised.
        seed: Of this participant's random selections.
        turn_timeout_seconds: The longest it waits for its turn.
        on_unreachable: What to do while the server cannot be reached: ``"wait"`` and try again, train
            round after round alone (``"local"``), or ``"fail"``. What was released and not answered is sent
            again when it does answer. Noise that a mechanism adds to training is added all along.
        unreachable_seconds: The longest that ``"wait"`` waits before it fails.
        transfer_dtype: How values travel, both ways: ``"float32"``, or in half of the bytes ``"bfloat16"`` or
            ``"float16"``.

    Raises:
        ConfigurationError: for an argument that cannot work, when the strategy is made or, where it
            depends on the module, before training starts.

    Without ``privacy`` no noise is added and nothing is claimed; with it, the mechanism's docstring says
    what is promised to whom, and ``docs/privacy.md`` what is not.
    """

    strategy_name = "dssgd"

    # Lightning hands the devices it has parsed from the Trainer's arguments to strategies with this
    # attribute; without it a strategy object stays on the CPU whatever the accelerator is.
    parallel_devices: list[torch.device] | None = None

    def __init__(
        self,
        server: str | Backend | None = None,
        participant: str | None = None,
        selection: Selection | None = None,
        bound: float | None = None,
        privacy: Mechanism | None = None,
        ledger: Ledger | str | Path | None = None,
        noise: NoiseSource | None = None,
        download_fraction: float = 1.0,
        round_length: int | Literal["epoch"] = "epoch",
        quantity: Quantity = "change",
        share: Share = None,
        share_buffers: str | Sequence[str] | None = None,
        initial: Initial = 0,
        seed: int = 0,
        turn_timeout_seconds: float = 3600.0,
        on_unreachable: OnUnreachable = "wait",
        unreachable_seconds: float = 600.0,
        transfer_dtype: ValueType = "float32",
    ) -> None:
        super().__init__()
        server = server if server is not None else _from_environment("server", "PPDL_SERVER")
        self._backend = server if isinstance(server, Backend) else connect(server)
        self.participant = require_name(
            "participant",
            participant if participant is not None else _from_environment("participant", "PPDL_PARTICIPANT"),
        )
        self._selection, self._bound = selection, bound
        self.privacy = privacy
        if privacy is None:
            self._make_plain_release()
        elif not isinstance(privacy, Mechanism):
            raise ConfigurationError(
                f"privacy={privacy!r} must be a mechanism, e.g. privacy=RecordLevel(epsilon=8, delta=1e-5)"
            )
        self._ledger = _check_ledger(privacy, ledger, noise)
        self._noise = SecretNoise() if noise is None and privacy is not None else noise
        self._private: PrivateTraining | None = None
        if isinstance(privacy, RecordLevel):
            assert self._noise is not None
            self._private = PrivateTraining(privacy, self._noise)
        self.download_fraction = require_fraction("download_fraction", download_fraction)
        self.round_length = require_round_length(round_length)
        require_choice("quantity", quantity, get_args(Quantity))
        if quantity == "gradient" and share_buffers is not None:
            raise ConfigurationError("share_buffers needs quantity='change': buffers have no gradients")
        self.quantity = quantity
        self.share = share
        self.share_buffers = share_buffers
        self.initial = check_initial(initial)
        if privacy is not None and initial == "own":
            raise ConfigurationError(
                "initial='own' would send this module's parameters un-noised, beside privacy="
                f"{privacy.name!r}; give a public seed, or the .safetensors file of public parameters"
            )
        if isinstance(privacy, RecordLevel) and share_buffers is not None:
            raise ConfigurationError(
                f"share_buffers={share_buffers!r} beside privacy='record': only gradients are made private, "
                f"and buffers may hold anything of the data; leave buffers local"
            )
        if not isinstance(seed, int):
            raise ConfigurationError(f"seed={seed!r} must be a whole number")
        self.seed = seed
        self.turn_timeout_seconds = require_positive("turn_timeout_seconds", turn_timeout_seconds)
        self.on_unreachable = require_choice("on_unreachable", on_unreachable, get_args(OnUnreachable))
        self.unreachable_seconds = require_not_negative("unreachable_seconds", unreachable_seconds)
        self.transfer_dtype = require_choice("transfer_dtype", transfer_dtype, get_args(ValueType))
        self._callback = DSSGDCallback()
        self._fitted: _Fitted | None = None
        self._opened: Ledger | None = None

    @property
    def server_url(self) -> str:
        """The server's address."""
        return self._backend.url

    @property
    def reports(self) -> list[RoundReport]:
        """One report a round that was shared, of this process."""
        return self._callback.reports

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    def make_participant(self, layout: ParameterLayout) -> Participant:
        """The participant that these settings describe, for a module's ``layout``; not joined yet."""
        if self.privacy is None:
            return self._participant(layout, self._make_plain_release())
        plan = self._plan(layout)
        mechanism = self.privacy.calibrated(plan)
        assert self._noise is not None
        release = mechanism.make_release(self._selection, self._bound, self._noise)
        carried: list[PrivateSteps] = []
        if self._private is not None:
            assert isinstance(mechanism, RecordLevel) and isinstance(release, PrivateStepsRelease)
            carried = self._private.start(mechanism, release)
        planned = plan.steps if mechanism.unit == "record" else plan.rounds
        account = Account(self._open_ledger(), self.participant, mechanism, mechanism.event(plan), planned)
        try:
            for event in carried:
                account.pay(0, event, 0, None)
            return self._participant(layout, release, account)
        except BaseException:
            account.close()  # nobody else will
            raise

    def _participant(
        self, layout: ParameterLayout, release: Release, account: Account | None = None
    ) -> Participant:
        manifest = Manifest(layout.specs, self.quantity, release.max_fraction(layout.size), release.bound)
        return Participant(
            self.participant,
            self._backend,
            manifest,
            release,
            self.download_fraction,
            self.seed,
            self.turn_timeout_seconds,
            account,
            self.on_unreachable,
            self.unreachable_seconds,
            self.transfer_dtype,
        )

    def _open_ledger(self) -> Ledger:
        """The ledger, opened: a path's is this strategy's to close, an open one is its owner's."""
        if isinstance(self._ledger, Ledger):
            return self._ledger
        assert self._ledger is not None
        self._opened = Ledger(self._ledger)
        return self._opened

    def _make_plain_release(self) -> PlainRelease:
        return PlainRelease(LargestValues() if self._selection is None else self._selection, self._bound)

    def _plan(self, layout: ParameterLayout) -> Plan:
        """What this fit() is going to do, from the Trainer; all of it is public."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        steps = trainer.estimated_stepping_batches
        # max_steps may end training well before max_epochs does.
        batches_an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        length = math.ceil(batches_an_epoch) if math.isfinite(batches_an_epoch) else math.inf
        rounds: float = steps / (length if self.round_length == "epoch" else self.round_length)
        if self.round_length == "epoch" and length == math.inf:
            epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
            rounds = epochs if epochs >= 0 else math.inf
        batches = self._private if self._private is not None else trainer.train_dataloader
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        return Plan(
            size=layout.size,
            rounds=math.ceil(rounds) if math.isfinite(rounds) else None,
            steps=int(steps) if math.isfinite(steps) else None,
            records=len(dataset) if isinstance(dataset, Sized) else None,
            batch_size=getattr(batches, "batch_size", None),
        )

    def setup_environment(self) -> None:
        super().setup_environment()
        # Not in setup(): by then the callbacks' own setup() and load_state_dict() have run, and a
        # resumed participant would silently start from nothing.
        assert self.lightning_module is not None
        callbacks: list[pl.Callback] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        attached = [callback for callback in callbacks if isinstance(callback, DSSGDCallback)]
        if not attached:
            callbacks.append(self._callback)
        else:
            self._callback = attached[0]
        if self._private is not None and self._private not in callbacks:
            # First of all, so that nobody is sent, or handed, a gradient without noise.
            callbacks.insert(0, self._private)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        # Lightning makes new ones at each fit(): momentum would be lost and schedulers start over.
        module = trainer.lightning_module
        if self._fitted is not None and self._fitted.module() is module:
            if self._fitted.parameters == _identities(module):
                return
            rank_zero_warn(
                "the module's parameters are others than at the last fit(): its optimizers and schedulers "
                "are made anew"
            )
        super().setup_optimizers(trainer)

    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self._private is None:
            return dataloader
        assert self.lightning_module is not None
        return self._private.process_dataloader(self.lightning_module.trainer, dataloader)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._private is None:
            return super().training_step(*args, **kwargs)
        return self._private.training_step(super().training_step, *args, **kwargs)

    def go_local(self) -> None:
        """From here on nothing is released: train without noise, where noise was added to gradients."""
        if self._private is not None:
            self._private.go_local()

    def on_train_end(self) -> None:
        super().on_train_end()
        assert self.lightning_module is not None
        self._fitted = _Fitted(weakref.ref(self.lightning_module), _identities(self.lightning_module))

    def teardown(self) -> None:
        # The one hook that runs after success, an exception and Ctrl-C alike.
        try:
            self._callback.leave()
        finally:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
        super().teardown()

    def _configure_launcher(self) -> None:
        if self.parallel_devices is not None and len(self.parallel_devices) > 1:
            raise ConfigurationError(
                f"devices={len(self.parallel_devices)}: DSSGDStrategy trains a participant on one device; "
                f"give Trainer(devices=1)"
            )
        super()._configure_launcher()


@dataclass(frozen=True)
class _Fitted:
    """What the kept optimizers belong to."""

    module: weakref.ref[pl.LightningModule]
    parameters: tuple[int, ...]


def _identities(module: pl.LightningModule) -> tuple[int, ...]:
    return tuple(id(parameter) for parameter in module.parameters())


def _check_ledger(
    privacy: Mechanism | None, ledger: Ledger | str | Path | None, noise: NoiseSource | None
) -> Ledger | str | Path | None:
    if noise is not None and not isinstance(noise, NoiseSource):
        raise ConfigurationError(f"noise={noise!r} must be a NoiseSource, or None for the operating system's")
    if privacy is None:
        if ledger is not None or noise is not None:
            raise ConfigurationError(
                f"ledger={ledger!r} and noise={noise!r} are for a privacy mechanism; give privacy=... too"
            )
        return None
    if ledger is None:
        return _from_environment("ledger", "PPDL_LEDGER")
    if not isinstance(ledger, Ledger | str | Path):
        raise ConfigurationError(
            f"ledger={ledger!r} must be the path of this data set's ledger, e.g. ledger='clinic-a.ledger'"
        )
    if noise is not None and noise.simulated and not (isinstance(ledger, Ledger) and ledger.path is None):
        raise ConfigurationError(
            f"noise={noise!r} can be taken off by whoever knows its seed, and ledger={str(ledger)!r} would "
            f"say that it protects; leave noise out, or in a simulation give a ledger in memory, "
            f"Ledger(None)"
        )
    return ledger


def _from_environment(argument: str, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise ConfigurationError(
            f"{argument} is missing: give DSSGDStrategy({argument}=...) or set the environment variable "
            f"{variable}"
        )
    return value
