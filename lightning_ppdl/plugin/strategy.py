"""The mixin that makes a Lightning strategy a participant's."""

from __future__ import annotations

import difflib
import inspect
import math
import weakref
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_ppdl.backends import Backend
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.initial import Initial
from lightning_ppdl.layout import ParameterLayout, Share
from lightning_ppdl.participant import OnUnreachable, Participant
from lightning_ppdl.plugin.packages import mismatch
from lightning_ppdl.plugin.private_training import PrivateTraining
from lightning_ppdl.plugin.ranks import Ranks
from lightning_ppdl.plugin.rounds import Rounds
from lightning_ppdl.plugin.settings import Settings
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import NoiseSource
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.records import Quantity, ValueType
from lightning_ppdl.round_report import RoundReport
from lightning_ppdl.selection import Selection

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.types import STEP_OUTPUT

    # Either package's: to name one would make the other's classes abstract to a type checker.
    _Strategy = Any
else:
    _Strategy = object

# Beyond the turn and the patience with a server, for what an exchange itself takes.
_EXCHANGE_SECONDS = 1800.0


class Collaboration(_Strategy):  # type: ignore[misc]
    """Brings rounds into a Trainer, and keeps what has to outlive a ``fit()``.

    For arguments see :class:`~lightning_ppdl.DSSGDStrategy`. Stands before a Lightning strategy among the
    bases of a class, which says what its callbacks are made of.
    """

    callback_class: ClassVar[type[Rounds]]
    private_class: ClassVar[type[PrivateTraining]]

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
        overlap_steps: int = 0,
        **lightning: Any,
    ) -> None:
        self._check(privacy, lightning)
        super().__init__(**lightning)
        self.settings = Settings(
            server,
            participant,
            selection,
            bound,
            privacy,
            ledger,
            noise,
            download_fraction,
            round_length,
            quantity,
            share,
            share_buffers,
            initial,
            seed,
            turn_timeout_seconds,
            on_unreachable,
            unreachable_seconds,
            transfer_dtype,
            overlap_steps,
        )
        self._private: PrivateTraining | None = None
        if isinstance(privacy, RecordLevel):
            assert self.settings.noise is not None
            self._private = self.private_class(privacy, self.settings.noise)
        self._callback = self.callback_class()
        self._fitted: _Fitted | None = None

    def __repr__(self) -> str:
        # Lightning shows this, and little else, where one package's Trainer is given the other's strategy.
        return f"<{mismatch(self)}>"

    @property
    def server_url(self) -> str:
        """The server's address."""
        return self.settings.backend.url

    @property
    def participant(self) -> str:
        """The participant's name at the server."""
        return self.settings.participant

    @property
    def reports(self) -> list[RoundReport]:
        """One report a round that was shared, of this process; none on ranks other than zero."""
        return self._callback.reports

    def enrol(self, layout: ParameterLayout) -> Participant:
        """The participant that the settings describe, for a module's ``layout``; not joined yet."""
        plan = Plan(layout.size) if self.settings.privacy is None else self._plan(layout)
        return self.settings.enrol(layout, plan, self._private)

    def make_ranks(self) -> Ranks:
        """This participant's processes; all of them have to call this."""
        settings = self.settings
        patience = settings.turn_timeout_seconds + settings.unreachable_seconds + _EXCHANGE_SECONDS
        return Ranks(getattr(self, "global_rank", 0), getattr(self, "world_size", 1), patience)

    def go_local(self) -> None:
        """From here on nothing is released: train without noise, where noise was added to gradients."""
        if self._private is not None:
            self._private.go_local()

    def _plan(self, layout: ParameterLayout) -> Plan:
        """What this fit() is going to do, from the Trainer; all of it is public."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        steps: float = trainer.estimated_stepping_batches
        if steps < 0:
            steps = math.inf  # Lightning's word for no max_steps, where the loader has no length
        # max_steps may end training well before max_epochs does.
        batches_an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        length = math.ceil(batches_an_epoch) if math.isfinite(batches_an_epoch) else math.inf
        round_length = self.settings.round_length
        rounds: float = steps / (length if round_length == "epoch" else round_length)
        if round_length == "epoch" and length == math.inf:
            epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
            rounds = min(epochs if epochs >= 0 else math.inf, steps)  # an epoch has one step at least
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
        callbacks: list[pl.Callback] = self.lightning_module.trainer.callbacks
        attached = [callback for callback in callbacks if isinstance(callback, Rounds)]
        if attached:
            self._callback = attached[0]
        # Noise first of all, so that nobody is sent, or handed, a gradient without it.
        first = [self._callback] if self._private is None else [self._private, self._callback]
        callbacks[:] = [*first, *(callback for callback in callbacks if callback not in first)]

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
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._callback.restore_generators(trainer, dataloader)
        return dataloader if self._private is None else self._private.process_dataloader(trainer, dataloader)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._private is None:
            return super().training_step(*args, **kwargs)  # type: ignore[no-any-return]
        return self._private.training_step(super().training_step, *args, **kwargs)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        assert self.lightning_module is not None
        self._callback.loaded_from(self.lightning_module, checkpoint)

    def on_train_end(self) -> None:
        super().on_train_end()
        assert self.lightning_module is not None
        if self._callback not in self.lightning_module.trainer.callbacks:
            return  # a Tuner's trial, whose schedulers were made for its own learning rates and length
        self._fitted = _Fitted(weakref.ref(self.lightning_module), _identities(self.lightning_module))

    def teardown(self) -> None:
        # The one hook that runs after success, an exception and Ctrl-C alike.
        try:
            self._callback.leave()
        finally:
            super().teardown()

    def _check(self, privacy: Mechanism | None, lightning: dict[str, Any]) -> None:
        """Refuse what cannot work on these devices; a misspelt argument first, which DDP would swallow."""
        known = {*inspect.signature(Collaboration.__init__).parameters, *self._lightning_arguments()}
        for name, value in lightning.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise ConfigurationError(
                    f"{name}={value!r}: {type(self).__name__} has no such argument; "
                    f"{f'did you mean {close[0]}?' if close else 'see its documentation for those it has'}"
                )

    def _lightning_arguments(self) -> set[str]:
        """What the Lightning strategy behind this mixin takes."""
        mro = type(self).__mro__
        behind = next(kind for kind in mro[mro.index(Collaboration) + 1 :] if "__init__" in kind.__dict__)
        return set(inspect.signature(behind).parameters) - {"args", "kwargs"}


class OneDevice(Collaboration):
    """A participant on one device: stands before ``SingleDeviceStrategy``."""

    # Lightning hands the devices it has parsed from the Trainer's arguments to strategies with this
    # attribute; without it a strategy object stays on the CPU whatever the accelerator is.
    parallel_devices: list[torch.device] | None = None
    num_nodes: int = 1  # likewise, whatever comes of it

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    def _configure_launcher(self) -> None:
        if self.parallel_devices is not None and len(self.parallel_devices) > 1:
            _refuse_several(f"devices={len(self.parallel_devices)}", "devices=1")
        super()._configure_launcher()

    def setup_environment(self) -> None:
        if self.num_nodes > 1:
            _refuse_several(f"num_nodes={self.num_nodes}", "num_nodes=1")
        super().setup_environment()


class SeveralDevices(Collaboration):
    """A participant on several devices: stands before ``DDPStrategy``.

    Rank zero alone speaks with the server. What it downloads, and what comes of each exchange, the other
    ranks hear from it.
    """

    def _check(self, privacy: Mechanism | None, lightning: dict[str, Any]) -> None:
        super()._check(privacy, lightning)
        method = lightning.get("start_method", "popen")
        if method != "popen":
            raise ConfigurationError(
                f"start_method={method!r}: only 'popen' will do, in a script; processes that are spawned or "
                f"forked end with fit(), and what the participant has to keep for the next one with them"
            )
        if isinstance(privacy, RecordLevel):
            raise ConfigurationError(
                "privacy='record' trains on one device: each of several would draw, clip and noise by "
                "itself; give DSSGDStrategy and Trainer(devices=1)"
            )

    def _lightning_arguments(self) -> set[str]:
        ddp = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
        return super()._lightning_arguments() | set(ddp) - {"self", "module", "device_ids"}


def _refuse_several(given: str, remedy: str) -> None:
    raise ConfigurationError(
        f"{given}: DSSGDStrategy trains a participant on one device; give Trainer({remedy}), or for several "
        f"DSSGDDDPStrategy, strategy='dssgd_ddp'"
    )


@dataclass(frozen=True)
class _Fitted:
    """What the kept optimizers belong to."""

    module: weakref.ref[pl.LightningModule]
    parameters: tuple[int, ...]


def _identities(module: pl.LightningModule) -> tuple[int, ...]:
    return tuple(id(parameter) for parameter in module.parameters())
