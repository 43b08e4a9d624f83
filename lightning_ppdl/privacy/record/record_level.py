"""DP-SGD: privacy of single records, by clipping and noising every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import NoiseSource
from lightning_ppdl.privacy.release import PlainRelease, Release, Released
from lightning_ppdl.privacy.residual import Residual
from lightning_ppdl.records import ParameterSpec
from lightning_ppdl.selection import LargestValues, Selection
from lightning_ppdl.validation import require_count, require_fraction, require_positive


@dataclass(frozen=True, kw_only=True)
class RecordLevel(Mechanism):
    """Each optimizer step sees a Poisson sample of the records, their clipped gradients, and noise.

    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1.

    Guarantee: everything that leaves is (epsilon, delta)-differentially private for the presence or
    absence of one record, whoever looks at it, at the epsilon that the ledger states. A step is the
    Gaussian mechanism, with deviation sigma C on a sum of sensitivity C, subsampled with rate q; whatever
    follows from the noised gradients alone (optimizer, momentum, selection, clamping, merging) is free.

    Assumptions: the records are all that the training depends on; n, q, sigma, C, the number of steps and
    the learning rate are public; one person is one record (who has k of them is protected k times less,
    and delta suffers more); the coins stay secret, and so does randomness inside the module (dropout); what
    trains or stays fixed starts from public values. The loss of an example must depend on no other example:
    that is tested on up to 24 records at the start of every fit(), so a loss that couples only from a later
    step on, or only for labels that none of those has (such as an ignore_index), is not found. No buffer may
    change from the first batch on, which is watched. Nor may normalisation statistics, class weights,
    vocabularies or tuned settings come from the data, which cannot be tested. Replacement of a record costs
    more than its absence.

    Args:
        noise_multiplier: sigma. Give this or ``epsilon``.
        epsilon: Target for the whole run at ``delta``; the noise is found before training. It is the data
            set's budget too, unless ``max_epsilon`` says otherwise.
        clip: C: the L2 norm to which each record's gradient, over all trainable parameters, is clipped.
        sampling_rate: q in (0, 1]; None for the train loader's batch size / n. An epoch is ``round(1 / q)``
            steps.
        steps: Optimizer steps that ``epsilon`` is for; None for what the Trainer plans.

    ==========================================  ======================================================
    nobody was drawn                            the step is made of noise alone
    a gradient holds NaN or infinity            its record adds zero, the noise stays
    an update is zero                           as any other; the steps before it were paid for
    a round's upload is lost, rejected or late  its steps are paid for all the same
    training ends between two releases          the steps since the last one are entered in the ledger
    ==========================================  ======================================================

    Raises:
        ConfigurationError: for a value out of range, for both or neither of ``noise_multiplier`` and
            ``epsilon``, for ``delta=0`` and for ``exact=True``.
    """

    unit = "record"
    name = "record"

    noise_multiplier: float | None = None
    epsilon: float | None = None
    clip: float = 1.0
    sampling_rate: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("clip", self.clip)
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ConfigurationError(
                f"noise_multiplier={self.noise_multiplier!r}, epsilon={self.epsilon!r}: give exactly one of "
                f"them, e.g. epsilon=8, and set the other to None (null on the command line)"
            )
        if self.noise_multiplier is not None:
            require_positive("noise_multiplier", self.noise_multiplier)
        if self.epsilon is not None:
            require_positive("epsilon", self.epsilon)
        if self.sampling_rate is not None:
            require_fraction("sampling_rate", self.sampling_rate)
        if self.steps is not None:
            require_count("steps", self.steps)
        if self.delta <= 0:
            raise ConfigurationError(
                f"delta={self.delta!r}: Gaussian noise needs a delta above 0 and well below 1 / the number "
                f"of records, e.g. delta=1e-5"
            )
        if self.exact:
            raise ConfigurationError(
                "exact=True: sums of gradients are formed in floating point, so exact noise would not make "
                "them exact; use exact=False here, or privacy of participants, which can be exact"
            )

    def rate(self, batch_size: int | None, records: int | None) -> float:
        """q, for a train loader's batch size and number of records.

        Raises:
            ConfigurationError: if it is not given and cannot be found.
        """
        if self.sampling_rate is not None:
            return self.sampling_rate
        if not batch_size or not records:
            raise ConfigurationError(
                f"sampling_rate=None takes batch size / records from the train loader, which has "
                f"{batch_size} and {records}; give sampling_rate=..., in (0, 1]"
            )
        return min(1.0, batch_size / records)

    def calibrated(self, plan: Plan) -> RecordLevel:
        rate = self.rate(plan.batch_size, plan.records)
        if plan.records and self.delta >= 1 / plan.records:
            warnings.warn(
                f"delta={self.delta:g} is not below 1 / n = {1 / plan.records:.2g}: a mechanism that "
                f"publishes a record at random satisfies that; give a delta well below",
                stacklevel=2,
            )
        if self.noise_multiplier is not None:
            return replace(self, sampling_rate=rate)
        steps = self.steps if self.steps is not None else plan.steps
        if steps is None or self.epsilon is None:
            raise ConfigurationError(
                f"epsilon={self.epsilon} is for a number of steps, and training has no planned end; give "
                f"steps=... or Trainer(max_epochs=...)"
            )
        from lightning_ppdl.privacy.accounting import calibrate_noise

        def make_event(noise_multiplier: float) -> PrivateSteps:
            return PrivateSteps(noise_multiplier, rate, self.clip, steps=1)

        found = calibrate_noise(make_event, steps, self.epsilon, self.delta)
        budget = self.epsilon if self.max_epsilon is None else self.max_epsilon
        return replace(
            self, noise_multiplier=found, epsilon=None, sampling_rate=rate, steps=steps, max_epsilon=budget
        )

    def event(self, plan: Plan) -> PrivateSteps:
        return self._event(self.rate(plan.batch_size, plan.records))

    def make_release(
        self, selection: Selection | None, bound: float | None, noise: NoiseSource
    ) -> PrivateStepsRelease:
        plain = PlainRelease(LargestValues() if selection is None else selection, bound)
        return PrivateStepsRelease(plain, self._event(self.rate(None, None)))

    def _event(self, rate: float) -> PrivateSteps:
        if self.noise_multiplier is None:
            raise ConfigurationError(
                f"epsilon={self.epsilon}: the noise is not found yet; call calibrated(plan)"
            )
        return PrivateSteps(self.noise_multiplier, rate, self.clip, steps=1)


@dataclass(frozen=True)
class PrivateStepsRelease(Release):
    """A plain release of what private steps made: it is free, the steps are what is paid for.

    Args:
        plain: How the update is selected and bounded. Any way is sound: it sees nothing but private values.
        step: What one step costs.
    """

    plain: PlainRelease
    step: PrivateSteps
    _taken: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    @property
    def bound(self) -> float | None:  # type: ignore[override]
        return self.plain.bound

    @property
    def residual(self) -> Residual | None:
        """Made of private steps that were paid for with the round that took them: free, like the rest."""
        return self.plain.residual

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> PrivateStepsRelease:
        # The steps stay counted in one place, for whoever holds either of the two.
        return replace(self, plain=self.plain.for_tensors(specs))

    @property
    def unrecorded(self) -> int:
        """Private steps since the last event, from wherever: all of them may be in the next release."""
        return self._taken[0]

    def count_steps(self, steps: int = 1) -> None:
        """Say that so many private steps were taken; before their gradients are used."""
        self._taken[0] += steps

    def unpaid(self) -> PrivateSteps | None:
        """The steps since the last event that was paid for, as one; None if there are none."""
        return replace(self.step, steps=self._taken[0]) if self._taken[0] else None

    def paid(self) -> None:
        self._taken[0] = 0

    def release(self, delta: Tensor, generator: torch.Generator) -> Released:
        return replace(self.plain.release(delta, generator), event=self.unpaid())

    def max_fraction(self, size: int) -> float:
        return self.plain.max_fraction(size)
