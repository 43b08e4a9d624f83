"""What a strategy's arguments ask for, checked, and the participant that they describe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from lightning_ppdl.backends import Backend, connect
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.initial import Initial, check_initial
from lightning_ppdl.layout import ParameterLayout, Share, require_patterns
from lightning_ppdl.participant import OnUnreachable, Participant
from lightning_ppdl.plugin.private_training import PrivateTraining
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import NoiseSource, SecretNoise
from lightning_ppdl.privacy.record.record_level import PrivateStepsRelease, RecordLevel
from lightning_ppdl.privacy.release import PlainRelease, Release
from lightning_ppdl.records import Manifest, Quantity, ValueType
from lightning_ppdl.selection import LargestValues, Selection
from lightning_ppdl.validation import (
    require_choice,
    require_fraction,
    require_name,
    require_not_negative,
    require_positive,
    require_round_length,
)


class Settings:
    """One participant's settings; the arguments are those of :class:`~lightning_ppdl.DSSGDStrategy`.

    Raises:
        ConfigurationError: for an argument that cannot work, or two that do not go together.
    """

    def __init__(
        self,
        server: str | Backend | None,
        participant: str | None,
        selection: Selection | None,
        bound: float | None,
        privacy: Mechanism | None,
        ledger: Ledger | str | Path | None,
        noise: NoiseSource | None,
        download_fraction: float,
        round_length: int | Literal["epoch"],
        quantity: Quantity,
        share: Share,
        share_buffers: str | Sequence[str] | None,
        initial: Initial,
        seed: int,
        turn_timeout_seconds: float,
        on_unreachable: OnUnreachable,
        unreachable_seconds: float,
        transfer_dtype: ValueType,
        overlap_steps: int,
    ) -> None:
        server = server if server is not None else _from_environment("server", "PPDL_SERVER")
        self.backend = server if isinstance(server, Backend) else connect(server)
        self.participant = require_name(
            "participant",
            participant if participant is not None else _from_environment("participant", "PPDL_PARTICIPANT"),
        )
        self.selection, self.bound = selection, bound
        if privacy is None:
            self._plain_release()
        elif not isinstance(privacy, Mechanism):
            raise ConfigurationError(
                f"privacy={privacy!r} must be a mechanism, e.g. privacy=RecordLevel(epsilon=8, delta=1e-5)"
            )
        self.privacy = privacy
        self.ledger = _check_ledger(privacy, ledger, noise)
        self.noise = SecretNoise() if noise is None and privacy is not None else noise
        self.download_fraction = require_fraction("download_fraction", download_fraction)
        self.round_length = require_round_length(round_length)
        self.quantity = require_choice("quantity", quantity, get_args(Quantity))
        if quantity == "gradient" and share_buffers is not None:
            raise ConfigurationError("share_buffers needs quantity='change': buffers have no gradients")
        self.share = require_patterns("share", share)
        if callable(share_buffers):
            raise ConfigurationError(f"share_buffers={share_buffers!r} must be name patterns, or None")
        self.share_buffers = require_patterns("share_buffers", share_buffers)
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
        if isinstance(overlap_steps, bool) or not isinstance(overlap_steps, int) or overlap_steps < 0:
            raise ConfigurationError(f"overlap_steps={overlap_steps!r} must be a whole number, 0 or more")
        self.overlap_steps = overlap_steps

    def enrol(self, layout: ParameterLayout, plan: Plan, private: PrivateTraining | None) -> Participant:
        """The participant, for a module's ``layout``; not joined yet.

        Args:
            layout: What of the module is shared.
            plan: What the Trainer is going to do; it matters under a mechanism only.
            private: What makes the Trainer's steps private, under a mechanism that needs it.
        """
        if self.privacy is None:
            return self._participant(layout, self._plain_release(), None)
        assert self.noise is not None and self.ledger is not None
        mechanism = self.privacy.calibrated(plan)
        release = mechanism.make_release(self.selection, self.bound, self.noise)
        carried: list[PrivateSteps] = []
        if private is not None:
            assert isinstance(mechanism, RecordLevel) and isinstance(release, PrivateStepsRelease)
            carried = private.start(mechanism, release)
        planned = plan.steps if mechanism.unit == "record" else plan.rounds
        account = Account(self.ledger, self.participant, mechanism, mechanism.event(plan), planned)
        try:
            for event in carried:
                account.pay(0, event, 0, None)
            return self._participant(layout, release, account)
        except BaseException:
            account.close()  # nobody else will
            raise

    def _participant(self, layout: ParameterLayout, release: Release, account: Account | None) -> Participant:
        release = release.for_tensors(layout.specs)
        manifest = Manifest(layout.specs, self.quantity, release.max_fraction(layout.size), release.bound)
        return Participant(
            self.participant,
            self.backend,
            manifest,
            release,
            self.download_fraction,
            self.seed,
            self.turn_timeout_seconds,
            account,
            self.on_unreachable,
            self.unreachable_seconds,
            self.transfer_dtype,
            overlap=self.overlap_steps > 0,
        )

    def _plain_release(self) -> PlainRelease:
        return PlainRelease(LargestValues() if self.selection is None else self.selection, self.bound)


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
