"""Participant-level privacy: the whole update is clipped and noised, and selections come where they may."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from auditing import Floats, fits
from scipy import stats
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import GaussianRound
from lightning_ppdl.privacy.mechanism import Plan
from lightning_ppdl.privacy.noise import NoiseSource, SecretNoise, SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.release import Released
from lightning_ppdl.selection import LargestValues, RandomFraction, Selection

SIZE = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update(norm: float, size: int = SIZE) -> Tensor:
    drawn = torch.randn(size, generator=generator())
    return drawn * (norm / float(drawn.norm()))


def released_by(
    mechanism: ParticipantLevel,
    delta: Tensor,
    selection: Selection | None = None,
    bound: float | None = None,
    noise: NoiseSource | None = None,
) -> Released:
    release = mechanism.make_release(selection, bound, noise or SeededNoise(0, simulated=True))
    return release.release(delta, generator())


def noise_in(released: Released, signal: Tensor) -> Floats:
    noise: Floats = (released.values.double() - signal[released.indices].double()).numpy()
    return noise


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("norm", "left"), [(0.0, 0.0), (0.1, 0.1), (0.5, 0.5), (80.0, 0.5)])
def test_noise_of_sigma_times_clip_goes_onto_the_clipped_update(
    norm: float, left: float, exact: bool
) -> None:
    mechanism = ParticipantLevel(noise_multiplier=0.7, delta=1e-5, clip=0.5, exact=exact)
    delta = update(norm or 1.0) * (norm > 0)
    released = released_by(mechanism, delta, noise=SecretNoise() if exact else None)
    assert released.indices.tolist() == list(range(SIZE))
    noise = noise_in(released, delta * (left / norm if norm else 1.0))
    assert fits(noise, stats.norm, 0.35)
    assert not fits(noise, stats.norm, 1.05 * 0.35)
    assert not fits(noise, stats.norm, 0.95 * 0.35)
    assert released.event == GaussianRound(0.7, 0.5, SIZE, exact)


def test_the_norm_of_what_is_noised_never_exceeds_the_clip() -> None:
    """With hardly any noise what is released is the clipped update; its direction is kept."""
    delta = update(80.0)
    released = released_by(ParticipantLevel(noise_multiplier=1e-9, delta=1e-5, clip=0.5), delta)
    assert float(released.values.double().norm()) == pytest.approx(0.5, rel=1e-6)
    assert float(torch.nn.functional.cosine_similarity(released.values, delta, dim=0)) > 0.999999
    exact = released_by(
        ParticipantLevel(noise_multiplier=1e-6, delta=1e-5, clip=0.5, exact=True), delta, noise=SecretNoise()
    )
    assert float(exact.values.double().norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_mask_comes_first_and_its_entries_alone_are_clipped_and_noised() -> None:
    mechanism = ParticipantLevel(noise_multiplier=0.7, delta=1e-5, clip=0.5)
    delta = update(1.0)
    released = released_by(mechanism, delta, RandomFraction(0.25))
    mask = RandomFraction(0.25).select(torch.zeros(SIZE), generator())
    assert released.indices.tolist() == mask.tolist() and len(mask) == SIZE // 4
    # The masked quarter has about half of the norm, so the clip, at that, hardly touches it.
    signal = delta * min(1.0, 0.5 / float(delta[mask].norm()))
    assert fits(noise_in(released, signal), stats.norm, 0.35)
    assert released.event == GaussianRound(0.7, 0.5, SIZE // 4)
    few_noise = released_by(
        ParticipantLevel(noise_multiplier=1e-9, delta=1e-5, clip=0.5), delta, RandomFraction(0.25)
    )
    assert float(few_noise.values.norm()) == pytest.approx(min(0.5, float(delta[mask].norm())), rel=1e-5)


def test_a_selection_by_size_is_made_after_the_noise() -> None:
    """All of the signal is in one half, and is nothing beside the noise: then both halves are as likely."""
    mechanism = ParticipantLevel(noise_multiplier=100.0, delta=1e-5, clip=0.5)
    delta = update(1.0) * (torch.arange(SIZE) < SIZE // 2)
    released = released_by(mechanism, delta, LargestValues(0.1))
    share = float((released.indices < SIZE // 2).float().mean())
    assert 0.45 < share < 0.55
    assert released.event == GaussianRound(100.0, 0.5, SIZE)
    everything = released_by(mechanism, delta)  # The same noise, nothing selected.
    largest = LargestValues(0.1).select(everything.values, generator())
    assert released.indices.tolist() == largest.tolist()
    assert released.values.tolist() == everything.values[largest].tolist()
    # And with little noise the signal decides.
    released = released_by(
        ParticipantLevel(noise_multiplier=1e-9, delta=1e-5, clip=0.5), delta, LargestValues(0.1)
    )
    assert int(released.indices.max()) < SIZE // 2


class _SaysItDoesNotLook(Selection):
    looks_at_data = False
    fraction = 0.5

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return LargestValues(0.5).select(delta, generator)


def test_a_selection_that_claims_not_to_look_is_shown_nothing() -> None:
    released = released_by(
        ParticipantLevel(noise_multiplier=1.0, delta=1e-5), update(1.0), _SaysItDoesNotLook()
    )
    assert len(released.indices) == 0 and released.event == GaussianRound(1.0, 1.0, 0)


def test_a_bound_comes_last() -> None:
    mechanism = ParticipantLevel(noise_multiplier=1.0, delta=1e-5, clip=0.5)
    released = released_by(mechanism, update(1.0), bound=0.25)
    assert float(released.values.abs().max()) == 0.25
    free = released_by(mechanism, update(1.0))
    assert released.values.tolist() == free.values.clamp(-0.25, 0.25).tolist()
    assert released.clamped_fraction == pytest.approx(float((free.values.abs() > 0.25).float().mean()))
    release = mechanism.make_release(RandomFraction(0.1), 0.25, SeededNoise(0, simulated=True))
    assert release.bound == 0.25 and release.max_fraction(105) == 10 / 105


def test_noise_is_calibrated_to_the_planned_rounds() -> None:
    target = ParticipantLevel(epsilon=8.0, delta=1e-5, clip=0.3)
    one, many = target.calibrated(Plan(10, rounds=1)), target.calibrated(Plan(10, rounds=100))
    assert one.noise_multiplier is not None and many.noise_multiplier is not None
    # Gaussian rounds compose into one with sqrt(rounds) less noise.
    assert many.noise_multiplier == pytest.approx(10 * one.noise_multiplier, rel=2e-3)
    # Balle and Wang's analytic Gaussian mechanism, solved here: delta of epsilon 8 at this sigma.
    sigma = one.noise_multiplier
    high, low = stats.norm.cdf(0.5 / sigma - 8 * sigma), stats.norm.cdf(-0.5 / sigma - 8 * sigma)
    assert 0.9e-5 < high - np.exp(8) * low <= 1e-5
    own = ParticipantLevel(epsilon=8.0, delta=1e-5, clip=0.3, rounds=100)
    assert own.calibrated(Plan(10)).noise_multiplier == many.noise_multiplier
    assert many.calibrated(Plan(10)) is many
    assert many.event(Plan(10)) == GaussianRound(many.noise_multiplier, 0.3, 10)
    with pytest.raises(ConfigurationError, match=r"no planned end.*rounds="):
        target.calibrated(Plan(10))
    for use in (lambda: target.event(Plan(10)), lambda: released_by(target, torch.ones(10))):
        with pytest.raises(ConfigurationError, match=r"epsilon=8\.0.*calibrated\(plan\) first"):
            use()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 1e-5}, "noise_multiplier=None, epsilon=None"),
        ({"noise_multiplier": 1.0, "epsilon": 1.0, "delta": 1e-5}, "exactly one of them.*null"),
        ({"noise_multiplier": 1.0}, "delta=0"),
        ({"noise_multiplier": 0.0, "delta": 1e-5}, r"noise_multiplier=0\.0"),
        ({"epsilon": -1.0, "delta": 1e-5}, r"epsilon=-1\.0"),
        ({"noise_multiplier": 1.0, "delta": 1e-5, "clip": 0.0}, r"clip=0\.0"),
        ({"noise_multiplier": 1.0, "delta": 1e-5, "rounds": 0}, "rounds=0"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ParticipantLevel(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "1.0", "nan", True, False, []])
@pytest.mark.parametrize("name", ["noise_multiplier", "epsilon", "delta", "max_epsilon", "clip", "rounds"])
def test_no_number_is_read_into_what_is_none(name: str, value: Any) -> None:
    given: dict[str, Any] = {} if name == "epsilon" else {"noise_multiplier": 1.0}
    with pytest.raises(ConfigurationError, match=re.escape(f"{name}={value!r}")):
        ParticipantLevel(**{**given, "delta": 1e-5, name: value})


@pytest.mark.parametrize("value", ["false", "False", 0, 1, None])
@pytest.mark.parametrize("name", ["public_validation", "exact"])
def test_a_switch_is_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{name}={value!r} must be True or False")):
        ParticipantLevel(**{"noise_multiplier": 1.0, "delta": 1e-5, name: value})


def test_a_lone_number_is_not_taken_for_the_noise() -> None:
    with pytest.raises(TypeError, match="positional"):
        ParticipantLevel(8.0, delta=1e-5)  # type: ignore[misc]


def test_what_cannot_be_released_is_refused() -> None:
    mechanism, noise = ParticipantLevel(noise_multiplier=1.0, delta=1e-5), SeededNoise(0, simulated=True)
    with pytest.raises(ConfigurationError, match=r"fraction=0\.1 of 9"):
        mechanism.make_release(RandomFraction(0.1), None, noise).max_fraction(9)
    with pytest.raises(ConfigurationError, match="seeded"):
        ParticipantLevel(noise_multiplier=1.0, delta=1e-5, exact=True).make_release(None, None, noise)


def test_a_diverged_update_is_released_as_noise_and_charged() -> None:
    mechanism = ParticipantLevel(noise_multiplier=1.0, delta=1e-5)
    diverged = released_by(mechanism, torch.tensor([float("nan"), 1.0]))
    nothing = released_by(mechanism, torch.zeros(2))
    assert torch.equal(diverged.values, nothing.values) and diverged.event is not None


def test_random_fraction_is_uniform_and_ignores_the_update() -> None:
    selection, stream, counts = RandomFraction(0.2), generator(), np.zeros(50)
    for _ in range(2000):
        counts[selection.select(torch.zeros(50), stream).numpy()] += 1
    # Without replacement: less spread than chi-square has, never more.
    assert stats.chisquare(counts).pvalue > 1e-5 and counts.sum() == 2000 * 10
    assert selection.select(torch.zeros(50), generator(3)).tolist() == (
        selection.select(torch.randn(50), generator(3)).tolist()
    )
    assert RandomFraction(1.0).select(torch.zeros(5), stream).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigurationError, match="fraction=0"):
        RandomFraction(0)
