"""Participant-level privacy: the whole update is clipped, and gets Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import GaussianRound
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import NoiseSource
from lightning_ppdl.privacy.release import PlainRelease, Release, Released, clamped, finite_or_zero
from lightning_ppdl.privacy.samplers import Sampler, make_sampler, on_grid
from lightning_ppdl.records import ParameterSpec
from lightning_ppdl.selection import ErrorFeedback, RandomFraction, Selection
from lightning_ppdl.validation import require_count, require_positive

# Covers the rounding errors of computing a norm in float64.
_A_HAIR_LESS = 1 - 2.0**-30


@dataclass(frozen=True, kw_only=True)
class ParticipantLevel(Mechanism):
    """Clips each round's update to an L2 norm of ``clip`` and adds Gaussian noise of standard deviation
    ``noise_multiplier * clip`` to every entry.

    Guarantee: for neighbours of which one has its whole update replaced by zero (the participant's data are
    there, or not), a round is the Gaussian mechanism with sensitivity ``clip``, and a run its composition
    over the rounds, at ``delta``. Exchanging the data for any other has sensitivity ``2 * clip``: count it
    with half the noise multiplier. Nothing is gained from which participants upload when: the server sees it.

    A selection that looks at the update (:class:`~lightning_ppdl.selection.LargestValues`) is made on the
    noised update: post-processing, at the price of noise in all of it. One that does not
    (:class:`~lightning_ppdl.selection.RandomFraction`) is made first: then only the chosen entries count
    for the clip, and are noised. A bound is applied last, and is post-processing too.

    Assumes that all settings are public, and that the planned rounds do not depend on the data.

    Args:
        noise_multiplier: sigma. Give either this or ``epsilon``.
        epsilon: Target for all planned rounds together, at ``delta``; the noise is calibrated to it. It is
            the data set's budget too, unless ``max_epsilon`` says otherwise.
        delta: Above 0; the Gaussian mechanism has no pure guarantee.
        clip: C, in the parameters' units.
        rounds: To calibrate for; None takes those that training plans.

    ==================  ==========================================================================
    zero update         released as noise alone
    norm below clip     left as it is; the noise is the same
    fraction            1, or no selection, releases every entry; none is a ConfigurationError
    ties                cannot matter: the noise is continuous (exact: the lowest indices win)
    NaN or infinity     the update counts as zero: released as noise alone, charged, and warned of
    ==================  ==========================================================================
    """

    unit = "participant"
    name = "participant"

    noise_multiplier: float | None = None
    epsilon: float | None = None
    clip: float = 1.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ConfigurationError(
                f"noise_multiplier={self.noise_multiplier!r}, epsilon={self.epsilon!r}: give exactly one of "
                f"them, and set the other to None (null on the command line); from epsilon the noise is "
                f"calibrated"
            )
        for name in ("noise_multiplier", "epsilon"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        if self.delta == 0:
            raise ConfigurationError(
                "delta=0: Gaussian noise has no guarantee without a delta; give one well below 1 over the "
                "number of participants, e.g. delta=1e-5"
            )
        require_positive("clip", self.clip)
        if self.rounds is not None:
            require_count("rounds", self.rounds)

    def calibrated(self, plan: Plan) -> ParticipantLevel:
        if self.epsilon is None:
            return self
        rounds = self.rounds or plan.rounds
        if rounds is None:
            raise ConfigurationError(
                f"epsilon={self.epsilon!r} is a target for all rounds, and training has no planned end; give "
                f"max_epochs or max_steps, or the mechanism's rounds=..."
            )
        from lightning_ppdl.privacy.accounting import calibrate_noise

        def event(noise_multiplier: float) -> GaussianRound:
            return GaussianRound(noise_multiplier, self.clip, plan.size, self.exact)

        sigma = calibrate_noise(event, rounds, self.epsilon, self.delta)
        budget = self.epsilon if self.max_epsilon is None else self.max_epsilon
        return replace(self, noise_multiplier=sigma, epsilon=None, max_epsilon=budget)

    def event(self, plan: Plan) -> GaussianRound:
        return GaussianRound(self._settled(), self.clip, plan.size, self.exact)

    def make_release(
        self, selection: Selection | None, bound: float | None, noise: NoiseSource
    ) -> ParticipantLevelRelease:
        self._settled()
        if isinstance(selection, ErrorFeedback):
            raise ConfigurationError(
                f"selection={selection!r} beside privacy=ParticipantLevel(...): what it keeps is un-noised, "
                f"and would carry one round's data into later releases; give the selection that is inside, "
                f"or protect records, privacy=RecordLevel(...), beside which it is sound"
            )
        plain = PlainRelease(RandomFraction(1.0) if selection is None else selection, bound)
        return ParticipantLevelRelease(self, plain, make_sampler(noise, self.exact))

    def _settled(self) -> float:
        if self.noise_multiplier is None:
            raise ConfigurationError(
                f"epsilon={self.epsilon!r} is a target that no noise was calibrated to yet; call "
                f"calibrated(plan) first"
            )
        return self.noise_multiplier


class ParticipantLevelRelease(Release):
    """Releases updates through ``mechanism`` with noise from ``sampler``; ``plain`` selects and bounds."""

    def __init__(self, mechanism: ParticipantLevel, plain: PlainRelease, sampler: Sampler) -> None:
        self._mechanism = mechanism
        self._plain = plain
        self._sampler = sampler
        self.bound = plain.bound

    def release(self, delta: Tensor, generator: torch.Generator) -> Released:
        delta = finite_or_zero(delta)
        if self._plain.selection.looks_at_data:
            noised = self._noised(delta)
            indices = self._plain.choose(noised, generator)
            values = noised[indices]
        else:
            # It is shown nothing, whatever it says of itself.
            indices = self._plain.choose(torch.zeros_like(delta), generator)
            values = noised = self._noised(delta[indices])
        return clamped(indices, values, self.bound, self._mechanism.event(Plan(len(noised))))

    def _noised(self, values: Tensor) -> Tensor:
        """float32 like ``values``, (n,): clipped, noised, and on the noise's public grid."""
        mechanism = self._mechanism
        scale = mechanism.event(Plan(len(values))).noise_multiplier * mechanism.clip
        clipped = values.detach().cpu().double().numpy()
        limit = mechanism.clip * _A_HAIR_LESS
        norm = float(np.linalg.norm(clipped))
        if norm > limit:
            clipped = clipped * (limit / norm)
        grid = self._sampler.grid(scale, scale)
        noised = self._sampler.place(clipped, grid) + self._sampler.gaussian(len(clipped), scale, grid)
        return torch.from_numpy(on_grid(noised, scale).astype(np.float32)).to(values.device)

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> ParticipantLevelRelease:
        return ParticipantLevelRelease(self._mechanism, self._plain.for_tensors(specs), self._sampler)

    def max_fraction(self, size: int) -> float:
        return self._plain.max_fraction(size)
