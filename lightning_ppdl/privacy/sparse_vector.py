"""The sparse vector mechanism: it chooses the entries that leave and perturbs them, in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import SparseVectorRound
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import Floats, NoiseSource
from lightning_ppdl.privacy.release import Release, Released, clamped, finite_or_zero
from lightning_ppdl.privacy.samplers import Sampler, make_sampler, on_grid
from lightning_ppdl.selection import Selection, require_entries
from lightning_ppdl.validation import require_fraction, require_not_negative, require_positive


@dataclass(frozen=True)
class Scales:
    """Scales of the Laplace noises, in the parameters' units.

    Args:
        threshold: Of the noise on the threshold.
        query: Of the noise on each magnitude that is compared with it.
        value: Of the noise on each released value.
        redrawn: Whether the threshold is noised anew after each upload.
    """

    threshold: float
    query: float
    value: float
    redrawn: bool


def paper_scales(epsilon: float, uploads: int, bound: float, value_share: float) -> Scales:
    """The paper's: eps1 = 8/9 eps, eps2 = 2/9 eps, sigma(x) = 2 c Delta_f / x with Delta_f = 2 gamma.

    The comparisons are charged 8/9 eps and the values 1/9. As magnitudes differ by gamma at most, and not
    by 2 gamma, 5/9 eps would have done; ``value_share`` plays no part.
    """

    def sigma(part: float) -> float:
        return 2 * uploads * 2 * bound / part

    return Scales(sigma(8 / 9 * epsilon), 2 * sigma(8 / 9 * epsilon), sigma(2 / 9 * epsilon), redrawn=True)


def standard_scales(epsilon: float, uploads: int, bound: float, value_share: float) -> Scales:
    """Those of Lyu, Su and Li, PVLDB 10(6), 2017, algorithm 7: Delta / eps1, 2 c Delta / eps2, and
    c * 2 gamma / eps3, with eps3 = ``value_share`` * eps and eps1 : eps2 = 1 : (2c)^(2/3).

    Delta = gamma: magnitudes lie in [0, gamma]. They rise and fall with the data, so 2c may not become c.
    """
    values = value_share * epsilon
    thresholds = (epsilon - values) / (1 + (2 * uploads) ** (2 / 3))
    queries = epsilon - values - thresholds
    return Scales(
        bound / thresholds, 2 * uploads * bound / queries, uploads * 2 * bound / values, redrawn=False
    )


VARIANTS: dict[str, Callable[[float, int, float, float], Scales]] = {
    "paper": paper_scales,
    "standard": standard_scales,
}


@dataclass(frozen=True)
class SparseVector(Mechanism):
    """Asks entries, in an order drawn anew each round, whether their noised magnitude reaches a noised
    threshold; those that do are released with noise of their own, until c have been.

    Guarantee: one round is (epsilon, 0)-differentially private for any change of the participant's whole
    data set, towards anybody who sees what it uploads. Each round costs its epsilon in full, however
    little it released: silence is output. Rounds add up; single records are covered at the same epsilon.

    Assumes that everything here, and the order in which entries are asked, is public and chosen without
    looking at the data, ``fraction`` and ``threshold`` included.

    Args:
        epsilon: Of one round. (The paper plots epsilon / c.)
        fraction: theta_u: at most c = floor(theta_u * P) entries are released.
        bound: gamma: every value is clamped into [-gamma, gamma] before anything else; all sensitivities
            follow from it.
        threshold: tau, for the noised magnitudes.
        variant: ``"paper"``, or ``"standard"``, whose noise is smaller; see :func:`paper_scales` and
            :func:`standard_scales`.
        value_share: Share of epsilon that the standard variant spends on the released values; the rest goes
            to the choice of entries. Half by default: neither noise is then more than twice as large as
            all of epsilon could make it.
        truncate: Clamps what was noised into [-truncate, truncate]. Post-processing: it costs no privacy, and
            biases values towards zero. None leaves them as they are.

    ==================  ==========================================================================
    zero update         asked like any other: noise alone decides what is released
    fraction            1 may release every entry; one that allows none is a ConfigurationError
    ties                cannot matter: the noise is continuous (exact: a tie reaches the threshold)
    NaN or infinity     the update counts as zero: released and charged like any other, and warned of
    nothing reached     an empty release, charged in full
    ==================  ==========================================================================

    Sources: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", section 3.6; Lyu, Su and
    Li, "Understanding the Sparse Vector Technique for Differential Privacy", PVLDB 10(6), 2017.
    """

    unit = "participant"
    name = "sparse_vector"
    selects = True

    epsilon: float
    fraction: float = 0.1
    bound: float = 0.001
    threshold: float = 0.0001
    variant: str = "standard"
    value_share: float = 0.5
    truncate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("epsilon", self.epsilon)
        require_fraction("fraction", self.fraction)
        require_positive("bound", self.bound)
        require_not_negative("threshold", self.threshold)
        if not isinstance(self.variant, str) or self.variant not in VARIANTS:
            raise ConfigurationError(f"variant={self.variant!r} must be one of {sorted(VARIANTS)}")
        if require_fraction("value_share", self.value_share) == 1:
            raise ConfigurationError("value_share=1 leaves nothing to choose entries with; use e.g. 0.5")
        if self.truncate is not None:
            require_positive("truncate", self.truncate)

    def scales(self, size: int) -> Scales:
        """The noise's scales for updates of ``size`` entries."""
        uploads = require_entries(self.fraction, size)
        return VARIANTS[self.variant](self.epsilon, uploads, self.bound, self.value_share)

    def calibrated(self, plan: Plan) -> SparseVector:
        require_entries(self.fraction, plan.size)
        return self

    def event(self, plan: Plan) -> SparseVectorRound:
        return SparseVectorRound(
            epsilon=self.epsilon,
            uploads=require_entries(self.fraction, plan.size),
            size=plan.size,
            bound=self.bound,
            threshold=self.threshold,
            variant=self.variant,
            exact=self.exact,
            value_share=self.value_share if self.variant == "standard" else None,
        )

    def make_release(
        self, selection: Selection | None, bound: float | None, noise: NoiseSource
    ) -> SparseVectorRelease:
        if selection is not None:
            raise ConfigurationError(
                f"selection={selection!r} beside privacy=SparseVector(...): the sparse vector mechanism "
                f"chooses the entries itself; leave the selection out, and give SparseVector its fraction"
            )
        if bound is not None and bound != self.bound:
            raise ConfigurationError(
                f"bound={bound!r} beside SparseVector(bound={self.bound!r}): the mechanism's bound is the "
                f"one that its noise is made for; leave the other out"
            )
        return SparseVectorRelease(self, make_sampler(noise, self.exact))


class SparseVectorRelease(Release):
    """Releases updates through ``mechanism``, with noise from ``sampler``."""

    def __init__(self, mechanism: SparseVector, sampler: Sampler) -> None:
        self._mechanism = mechanism
        self._sampler = sampler
        # What is released exceeds gamma, by its noise.
        self.bound = mechanism.truncate

    def release(self, delta: Tensor, generator: torch.Generator) -> Released:
        delta = finite_or_zero(delta)
        mechanism, sampler, size = self._mechanism, self._sampler, delta.numel()
        scales = mechanism.scales(size)
        event = mechanism.event(Plan(size))
        grid = sampler.grid(mechanism.bound, max(scales.threshold, scales.query, scales.value))

        bounded = delta.detach().cpu().double().numpy().clip(-mechanism.bound, mechanism.bound)
        bounded = sampler.place(bounded, grid)
        threshold = sampler.place(np.array(mechanism.threshold), grid)

        # An order of all entries, because it is public: a sample of those that reach the threshold, drawn
        # with coins that others know, would tell them how many there are.
        order = torch.randperm(size, generator=generator).numpy()
        answers = np.abs(bounded)[order]
        answers += sampler.laplace(size, scales.query, grid)
        draws = event.uploads if scales.redrawn else 1
        thresholds = threshold + sampler.laplace(draws, scales.threshold, grid)
        reached = first_reaching(answers, np.broadcast_to(thresholds, event.uploads))

        indices = np.sort(order[reached])
        # Noise of their own: an answer's noise is known, by half, to have reached the threshold.
        noised = bounded[indices]
        noised += sampler.laplace(len(indices), scales.value, grid)
        values = torch.from_numpy(on_grid(noised, scales.value).astype(np.float32)).to(delta.device)
        return clamped(torch.from_numpy(indices).to(delta.device), values, self.bound, event)

    def max_fraction(self, size: int) -> float:
        return require_entries(self._mechanism.fraction, size) / size


def first_reaching(answers: Floats, thresholds: Floats) -> npt.NDArray[np.int64]:
    """Places of the answers that reach the threshold of their turn: the first answer to reach
    ``thresholds[0]``, the first after it to reach ``thresholds[1]``, and so on.

    Args:
        answers: (P,), in the order in which they are asked.
        thresholds: (c,), c of 1 or more.

    Returns:
        int64 (k,), increasing, k <= c.
    """
    # One that reaches no threshold can be passed over; where all thresholds are equal the rest all count.
    candidates = np.flatnonzero(answers >= thresholds.min())
    reached: list[int] = []
    remaining = iter(thresholds.tolist())
    threshold = next(remaining)
    for place, answer in zip(candidates.tolist(), answers[candidates].tolist()):
        if answer >= threshold:
            reached.append(place)
            if len(reached) == len(thresholds):
                break
            threshold = next(remaining)
    return np.array(reached, dtype=np.int64)
