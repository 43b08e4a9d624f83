"""What a private collaboration would cost, and whether it could learn anything, before anything is run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.accounting import Spent, affordable, per_parameter_epsilon, round_up, total
from lightning_ppdl.privacy.events import GaussianRound, PrivacyEvent, PrivateSteps
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.validation import require_count

HOPELESS_BELOW = 1.0
"""All uploads of the run together hold less signal than noise."""
WEAK_BELOW = 5.0


@dataclass(frozen=True)
class Collaboration:
    """The public facts that a plan rests on.

    Args:
        participants: N.
        rounds: Uploads that each of them makes.
        parameters: P, the shared entries; with a random mask, the entries that it leaves.
        records: n, the training examples of each participant.
        batch_size: Of local training; for the record level, the expected size of a sample.
        steps_per_round: Optimizer steps in a round; None takes an epoch's.
    """

    participants: int
    rounds: int
    parameters: int
    records: int
    batch_size: int
    steps_per_round: int | None = None

    def __post_init__(self) -> None:
        for name in ("participants", "rounds", "parameters", "records", "batch_size"):
            require_count(name, getattr(self, name))
        if self.steps_per_round is not None:
            require_count("steps_per_round", self.steps_per_round)
        if self.batch_size > self.records:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is more than records={self.records}; make it smaller"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps in each round."""
        return self.steps_per_round or math.ceil(self.records / self.batch_size)

    @property
    def plan(self) -> Plan:
        """The same, as mechanisms take it."""
        return Plan(self.parameters, self.rounds, self.rounds * self.steps, self.records, self.batch_size)


@dataclass(frozen=True)
class Forecast:
    """What a mechanism costs and leaves of the signal.

    The signal is the best there can be: every value as large as its bound allows, every participant and
    every round pointing the same way. Real updates are smaller and disagree, so a ratio below 1 for the
    whole run says that nothing can be learnt; a large one does not promise that something will.

    Args:
        spent: The whole run's total.
        stricter: The same at a second delta: a hundredth of the first; 1e-5 beside a pure total.
        replaced: Epsilon for neighbours that differ by replacement.
        noise_multiplier: sigma, rounded up; None for the sparse vector mechanism.
        upload_ratio: Signal to noise of one value of one upload: the largest magnitude that the bound or
            the clip allows in it, over the noise's standard deviation.
        run_ratio: Signal to noise of the mean over all participants and rounds.
        per_parameter_epsilon: The paper's figure, epsilon / c for a single value of a single round. No
            guarantee by itself; None for other mechanisms.
        rounds: That are planned.
        affordable_rounds: Of these, those that the budget has room for; None without a budget. All other
            figures are for the planned ones.
        warning: What is wrong with the setting; empty if nothing is.
    """

    spent: Spent
    stricter: Spent
    replaced: float
    noise_multiplier: float | None
    upload_ratio: float
    run_ratio: float
    per_parameter_epsilon: float | None
    rounds: int
    affordable_rounds: int | None
    warning: str

    @property
    def ends_early(self) -> bool:
        """Whether the budget ends the run before its planned rounds are done."""
        return self.affordable_rounds is not None and self.affordable_rounds < self.rounds

    @property
    def verdict(self) -> str:
        """``"hopeless"``, ``"weak"`` or ``"workable"``, by :attr:`run_ratio`."""
        if self.run_ratio < HOPELESS_BELOW:
            return "hopeless"
        return "weak" if self.run_ratio < WEAK_BELOW else "workable"


def forecast(mechanism: Mechanism, collaboration: Collaboration) -> Forecast:
    """What ``mechanism``, with its noise calibrated where it has a target, costs in ``collaboration``.

    Raises:
        ConfigurationError: for a target that cannot be met.
    """
    rate = getattr(mechanism, "sampling_rate", None)
    if rate is not None and collaboration.steps_per_round is None:
        # An epoch of Poisson samples is so many draws, whatever the loader's batch size.
        collaboration = replace(collaboration, steps_per_round=max(1, round(1 / rate)))
    mechanism = mechanism.calibrated(collaboration.plan)
    event = mechanism.event(collaboration.plan)
    events: list[PrivacyEvent] = [event] * collaboration.rounds
    if isinstance(event, PrivateSteps):
        events *= collaboration.steps
    delta = mechanism.delta
    upload = _upload_ratio(mechanism, event, collaboration)
    noise = event.noise_multiplier if isinstance(event, GaussianRound | PrivateSteps) else None
    return Forecast(
        spent=total(events, delta),
        stricter=total(events, float(f"{delta / 100:.6g}") if delta else 1e-5),
        replaced=total(events, delta, replace=True).epsilon,
        noise_multiplier=None if noise is None else round_up(noise),
        upload_ratio=upload,
        run_ratio=upload * math.sqrt(collaboration.participants * collaboration.rounds),
        per_parameter_epsilon=per_parameter_epsilon(event),
        rounds=collaboration.rounds,
        affordable_rounds=_affordable_rounds(mechanism, event, collaboration),
        warning=_warning(mechanism, collaboration),
    )


def _affordable_rounds(mechanism: Mechanism, event: PrivacyEvent, collaboration: Collaboration) -> int | None:
    if mechanism.max_epsilon is None:
        return None
    a_round = collaboration.steps if isinstance(event, PrivateSteps) else 1
    most = collaboration.rounds * a_round
    fitting = affordable([], event, mechanism.max_epsilon, mechanism.delta, most, unit=mechanism.unit)
    return fitting // a_round


def _upload_ratio(mechanism: Mechanism, event: PrivacyEvent, collaboration: Collaboration) -> float:
    """Largest signal over the noise's standard deviation, for one value of one upload."""
    size = collaboration.parameters
    if isinstance(mechanism, SparseVector):
        return mechanism.bound / (math.sqrt(2) * mechanism.scales(size).value)
    if isinstance(event, GaussianRound):
        return 1 / (event.noise_multiplier * math.sqrt(size))  # clip / sqrt(P), over sigma * clip
    if isinstance(event, PrivateSteps):
        # q n gradients of norm clip, all alike, over sigma * clip; steps add up, their noise as the root.
        together = event.sampling_rate * collaboration.records * math.sqrt(collaboration.steps)
        return together / (event.noise_multiplier * math.sqrt(size))
    raise ConfigurationError(f"there is no plan for {type(event).__name__} events")


def _warning(mechanism: Mechanism, collaboration: Collaboration) -> str:
    protected = collaboration.records if mechanism.unit == "record" else collaboration.participants
    if mechanism.delta * protected < 1:
        return ""
    return (
        f"delta={mechanism.delta:g} is not below 1/{protected:,}: to give one of {protected:,} "
        f"{mechanism.unit}s away in full would pass"
    )
