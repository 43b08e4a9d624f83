"""The drop-in: a Lightning strategy that makes a module a participant of a collaboration."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_warn

from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.callbacks import DSSGDCallback
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.initial import Initial, check_initial
from lightning_ppdl.layout import ParameterLayout, Share
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.records import Manifest, Quantity
from lightning_ppdl.selection import LargestValues, Selection
from lightning_ppdl.validation import (
    require_fraction,
    require_name,
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

    Raises:
        ConfigurationError: for an argument that cannot work, when the strategy is made or, where it
            depends on the module, before training starts.

    No noise is added: this strategy makes no claim of differential privacy.
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
        download_fraction: float = 1.0,
        round_length: int | Literal["epoch"] = "epoch",
        quantity: Quantity = "change",
        share: Share = None,
        share_buffers: str | Sequence[str] | None = None,
        initial: Initial = 0,
        seed: int = 0,
        turn_timeout_seconds: float = 3600.0,
    ) -> None:
        super().__init__()
        server = server if server is not None else _from_environment("server", "PPDL_SERVER")
        self._backend = server if isinstance(server, Backend) else connect(server)
        self.participant = require_name(
            "participant",
            participant if participant is not None else _from_environment("participant", "PPDL_PARTICIPANT"),
        )
        self.release = PlainRelease(LargestValues() if selection is None else selection, bound)
        self.download_fraction = require_fraction("download_fraction", download_fraction)
        self.round_length = require_round_length(round_length)
        if quantity not in ("change", "gradient"):
            raise ConfigurationError(f"quantity={quantity!r} must be 'change' or 'gradient'")
        if quantity == "gradient" and share_buffers is not None:
            raise ConfigurationError("share_buffers needs quantity='change': buffers have no gradients")
        self.quantity = quantity
        self.share = share
        self.share_buffers = share_buffers
        self.initial = check_initial(initial)
        if not isinstance(seed, int):
            raise ConfigurationError(f"seed={seed!r} must be a whole number")
        self.seed = seed
        self.turn_timeout_seconds = require_positive("turn_timeout_seconds", turn_timeout_seconds)
        self._callback = DSSGDCallback()
        self._fitted: _Fitted | None = None

    @property
    def server_url(self) -> str:
        """The server's address."""
        return self._backend.url

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    def make_participant(self, layout: ParameterLayout) -> Participant:
        """The participant that these settings describe, for a module's ``layout``; not joined yet."""
        manifest = Manifest(
            layout.specs, self.quantity, self.release.max_fraction(layout.size), self.release.bound
        )
        return Participant(
            self.participant,
            self._backend,
            manifest,
            self.release,
            self.download_fraction,
            self.seed,
            self.turn_timeout_seconds,
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

    def on_train_end(self) -> None:
        super().on_train_end()
        assert self.lightning_module is not None
        self._fitted = _Fitted(weakref.ref(self.lightning_module), _identities(self.lightning_module))

    def teardown(self) -> None:
        # The one hook that runs after success, an exception and Ctrl-C alike.
        self._callback.leave()
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


def _from_environment(argument: str, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise ConfigurationError(
            f"{argument} is missing: give DSSGDStrategy({argument}=...) or set the environment variable "
            f"{variable}"
        )
    return value
