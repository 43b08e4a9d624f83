"""What a simulation found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[int, str], None]
"""Called with the participant-rounds just done and a line that says where the run is."""


@dataclass(frozen=True)
class RoundRow:
    """One round of the collaboration: as many uploads as there are participants.

    Args:
        round: Counts from 1.
        accuracy: Of the server's parameters on the test set, in [0, 1].
        uploaded_bytes, downloaded_bytes: Encoded, in this round, over all participants.
        staleness_mean: Over the uploads merged in this round.
        seconds: Wall clock spent in this round, evaluation excluded.
    """

    round: int
    accuracy: float
    uploaded_bytes: int
    downloaded_bytes: int
    staleness_mean: float
    seconds: float


@dataclass
class Curve:
    """A baseline: test accuracies of one or several models after each round, and the time it took.

    Args:
        accuracies: One list a model, one accuracy in [0, 1] a round.
        seconds: Wall clock, evaluation excluded.
    """

    accuracies: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def final(self) -> list[float]:
        """Accuracy after the last round, one a model."""
        return [rounds[-1] for rounds in self.accuracies]


@dataclass(frozen=True)
class PrivacySummary:
    """What the run cost in privacy; no figure where no guarantee was given.

    Args:
        mechanism: As in ``privacy=NAME``; ``"none"`` for no noise.
        simulated: Whether the noise follows from a public seed, so that nothing was really protected.
        released_values: Values that left, over all participants, merged or not.
        epsilon, delta: The largest total over the participants, whose data are disjoint.
        unit: Whose presence is hidden: ``"participant"`` or ``"record"``.
        neighbours: The neighbouring relation.
        method: How the total was composed.
        per_parameter_epsilon: The paper's figure: what a round cost over the values it may release. No
            measure of what leaked.
    """

    mechanism: str
    simulated: bool
    released_values: int
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    neighbours: str | None = None
    method: str | None = None
    per_parameter_epsilon: float | None = None


@dataclass(frozen=True)
class SimulationResults:
    """All figures of one simulation.

    Args:
        participants, parameters, seed: Of the run.
        rows: One a round.
        uploads: Accepted ones.
        staleness_mean, staleness_max: Over all accepted uploads.
        seconds: Wall clock of the collaboration, evaluation excluded.
        privacy: What it cost in privacy.
        standalone, centralized: The baselines, None where not run.
    """

    participants: int
    parameters: int
    seed: int
    rows: list[RoundRow]
    uploads: int
    staleness_mean: float
    staleness_max: int
    seconds: float
    privacy: PrivacySummary
    standalone: Curve | None
    centralized: Curve | None
