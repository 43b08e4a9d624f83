"""What a strategy's ``privacy`` argument takes: one object that says how releases are made private."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import PrivacyEvent, Unit
from lightning_ppdl.privacy.noise import NoiseSource
from lightning_ppdl.privacy.release import Release
from lightning_ppdl.selection import Selection
from lightning_ppdl.validation import require_positive

Exhausted = Literal["stop", "local"]


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, as far as it is public and known before training.

    Args:
        size: P, the shared entries.
        rounds: Releases that are planned; None if training has no planned end.
        steps: Optimizer steps that are planned; None likewise.
        records: n, the participant's number of training examples; None where it has no length.
        batch_size: The train loader's; None where it has none.
    """

    size: int
    rounds: int | None = None
    steps: int | None = None
    records: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """How releases are made private, and the budget they are held to.

    Args:
        delta: The probability, below 1 / n, with which the guarantee may fail; 0 for a pure one.
        max_epsilon: No release is made that would bring the ledger's total beyond it; None for no limit but
            a target that the mechanism may have.
        on_exhausted: What then: ``"stop"`` ends training; ``"local"`` goes on without exchanging, and
            marks what it trains as tainted.
        public_validation: Whether validation data are public, so that what is released when may follow
            their metrics: early stopping and, at the level of records, schedules.
        exact: Draw noise with exact discrete samplers, which have no floating-point leak and are slower.
    """

    unit: ClassVar[Unit]
    name: ClassVar[str]
    """As in ``privacy=NAME`` on the command line."""
    selects: ClassVar[bool] = False
    """Whether it chooses the entries itself, so that a selection beside it is an error."""

    delta: float = 0.0
    max_epsilon: float | None = None
    on_exhausted: Exhausted = "stop"
    public_validation: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        delta = self.delta
        if isinstance(delta, bool) or not isinstance(delta, Real) or not 0 <= delta < 1:
            raise ConfigurationError(f"delta={delta!r} must be a number in [0, 1), e.g. delta=1e-5")
        if self.max_epsilon is not None:
            require_positive("max_epsilon", self.max_epsilon)
        for name in ("public_validation", "exact"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name}={value!r} must be True or False, e.g. {name}=False")
        if self.on_exhausted not in ("stop", "local"):
            raise ConfigurationError(f"on_exhausted={self.on_exhausted!r} must be 'stop' or 'local'")

    @abstractmethod
    def calibrated(self, plan: Plan) -> Mechanism:
        """This mechanism with its noise settled for ``plan``; itself where nothing is left to settle.

        Raises:
            ConfigurationError: if the target cannot be met, or the plan lacks what settling it needs.
        """

    @abstractmethod
    def event(self, plan: Plan) -> PrivacyEvent:
        """What one round, or for record-level mechanisms one step, of this calibrated mechanism costs."""

    @abstractmethod
    def make_release(self, selection: Selection | None, bound: float | None, noise: NoiseSource) -> Release:
        """The door through which updates leave under this mechanism.

        Args:
            selection: The one that the user asked for, None if none was.
            bound: gamma, or None.
            noise: Where all randomness that needs secrecy comes from.

        Raises:
            ConfigurationError: for a combination that would be unsound, with the reason.
        """
