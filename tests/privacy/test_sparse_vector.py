"""The sparse vector mechanism: noise of the right size in the right places, and never more than agreed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from auditing import Floats, crossing_probability, fits, happens_with
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sparse_vector_twin import Draws, Twin, draw

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import SparseVectorRound
from lightning_ppdl.privacy.mechanism import Plan
from lightning_ppdl.privacy.noise import NoiseSource, SecretNoise, SeededNoise
from lightning_ppdl.privacy.release import Release, Released
from lightning_ppdl.privacy.sparse_vector import SparseVector, first_reaching
from lightning_ppdl.selection import LargestValues

VARIANTS = ["paper", "standard"]
OFF = ["query_off", "threshold_off", "value_off"]


def release_of(mechanism: SparseVector, noise: NoiseSource | None = None) -> Release:
    return mechanism.make_release(None, None, noise or SeededNoise(0, simulated=True))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twin_of(mechanism: SparseVector, uploads: int) -> Twin:
    return Twin(
        mechanism.epsilon,
        uploads,
        mechanism.bound,
        mechanism.threshold,
        mechanism.variant,
        mechanism.value_share,
    )


def with_off(twin: Twin, off: str, factor: float) -> Twin:
    changes: dict[str, Any] = {off: factor}
    return replace(twin, **changes)


def in_order(released: Released, order: Any) -> Floats:
    """(P,) released values, NaN where nothing was, in the order in which entries were asked."""
    dense = np.full(len(order), np.nan)
    dense[released.indices.numpy()] = released.values.double().numpy()
    asked: Floats = dense[order]
    return asked


# --- the constants, one by one -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slow_twin_agrees_and_none_that_is_5_percent_off(variant: str) -> None:
    size, uploads = 2000, 400
    mechanism = SparseVector(
        400.0, fraction=0.2, bound=0.01, threshold=0.02, variant=variant, value_share=0.4
    )
    delta = torch.randn(size, generator=generator()) * 0.01
    released = release_of(mechanism).release(delta, generator(5))

    noise = SeededNoise(0, simulated=True)
    order = torch.randperm(size, generator=generator(5)).numpy()
    queries = noise.laplace(size)
    thresholds = noise.laplace(uploads if variant == "paper" else 1)
    places = np.argsort(order)[released.indices.numpy()]
    values = np.zeros(size)
    values[places] = noise.laplace(len(places))
    draws = Draws(queries[None], np.broadcast_to(thresholds, (1, uploads)), values[None])

    asked = delta.double().numpy()[order]
    twin = twin_of(mechanism, uploads)
    expected = twin(asked, draws)[0]
    assert 100 < np.isfinite(expected).sum() <= uploads
    grid = 2 * twin.scales()[2] * 2.0**-20
    found = in_order(released, order)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=grid)
    for off in OFF:
        for factor in (0.95, 1.05):
            wrong = with_off(twin, off, factor)(asked, draws)[0]
            assert not np.allclose(found, wrong, rtol=1e-6, atol=grid, equal_nan=True), off


@pytest.mark.parametrize(
    ("variant", "threshold", "query", "value"),
    # epsilon 2, c 4, gamma 0.5, by hand: sigma(16/9) = 8/(16/9), sigma(4/9) = 8/(4/9); and
    # eps3 = 1, eps1 = 1/5, eps2 = 4/5 as (2c)^(2/3) = 4.
    [("paper", 4.5, 9.0, 18.0), ("standard", 2.5, 5.0, 4.0)],
)
def test_the_constants_by_hand(variant: str, threshold: float, query: float, value: float) -> None:
    scales = SparseVector(2.0, fraction=0.4, bound=0.5, variant=variant).scales(10)
    assert [scales.threshold, scales.query, scales.value] == pytest.approx([threshold, query, value])
    assert scales.redrawn == (variant == "paper")
    # What the comparisons and the values cost, with sensitivities gamma and 2 gamma.
    choosing = 4 * (0.5 / threshold + 2 * 0.5 / query) if variant == "paper" else 0.5 / threshold + 4 / query
    assert choosing + 4 * 1.0 / value == pytest.approx(2.0 * (5 / 9 if variant == "paper" else 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_values_carry_fresh_noise_of_their_scale(variant: str) -> None:
    size = 60_000
    mechanism = SparseVector(3.0 * size, fraction=1.0, bound=0.01, threshold=0.0, variant=variant)
    delta = torch.randn(size, generator=generator()) * 0.01
    released = release_of(mechanism, SeededNoise(3, simulated=True)).release(delta, generator())
    assert len(released.indices) > 20_000
    noise = (released.values - delta.clamp(-0.01, 0.01)[released.indices]).double().numpy()
    scale = mechanism.scales(size).value
    assert fits(noise, stats.laplace, scale)
    assert not fits(noise, stats.laplace, 1.05 * scale)
    assert not fits(noise, stats.laplace, 0.95 * scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_comparisons_succeed_as_often_as_they_should(variant: str) -> None:
    """One entry, c = 1: the margin decides, through the noise of the entry and of the threshold."""
    mechanism = SparseVector(2.0, fraction=1.0, bound=1.0, threshold=0.7, variant=variant)
    scales, runs = mechanism.scales(1), 3000
    release = release_of(mechanism)
    for entry in (0.0, 9.0):  # The second is clamped to 1.
        delta, stream = torch.tensor([entry]), generator()
        hits = sum(len(release.release(delta, stream).indices) for _ in range(runs))
        margin = 0.7 - min(entry, 1.0)
        assert happens_with(crossing_probability(margin, scales.query, scales.threshold), hits, runs)
        assert not happens_with(
            crossing_probability(margin + 1.0, scales.query, scales.threshold), hits, runs
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("off", ["query_off", "threshold_off"])
def test_each_comparison_noise_shows_in_how_often_they_succeed(variant: str, off: str) -> None:
    """So many runs as only the twin, which agrees with the mechanism, can make."""
    runs, twin = 1_000_000, Twin(2.0, 1, bound=1.0, threshold=4.0, variant=variant)
    draws = draw(np.random.default_rng(0), runs, 1, 1, variant)
    threshold, query, _ = twin.scales()
    hits = int(np.isfinite(twin(np.zeros(1), draws)).sum())
    assert happens_with(crossing_probability(4.0, query, threshold), hits, runs)
    wrong = int(np.isfinite(with_off(twin, off, 1.05)(np.zeros(1), draws)).sum())
    assert not happens_with(crossing_probability(4.0, query, threshold), wrong, runs)


# --- the search for the entries that reach the threshold -----------------------------------------------


@given(
    answers=hnp.arrays(np.float64, st.integers(0, 40), elements=st.integers(-3, 3)),
    thresholds=hnp.arrays(np.float64, st.integers(1, 12), elements=st.integers(-3, 3)),
)
def test_the_search_against_asking_one_by_one(answers: Floats, thresholds: Floats) -> None:
    expected: list[int] = []
    for place, answer in enumerate(answers):
        if len(expected) < len(thresholds) and answer >= thresholds[len(expected)]:
            expected.append(place)
    assert first_reaching(answers, thresholds).tolist() == expected


@settings(max_examples=60)
@given(
    delta=hnp.arrays(np.float32, st.integers(2, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    fraction=st.floats(0.5, 1.0),
    epsilon=st.sampled_from([1e-3, 1.0, 1e3, 1e300]),
    variant=st.sampled_from(VARIANTS),
    truncate=st.sampled_from([None, 1e-3, 2e-3]),
)
def test_what_leaves_keeps_to_what_was_agreed(
    delta: Any, fraction: float, epsilon: float, variant: str, truncate: float | None
) -> None:
    mechanism = SparseVector(epsilon, fraction=fraction, variant=variant, truncate=truncate)
    release = release_of(mechanism)
    released = release.release(torch.from_numpy(delta), generator())
    indices = released.indices
    assert indices.dtype == torch.int64 and released.values.dtype == torch.float32
    assert len(indices) == len(released.values) <= release.max_fraction(len(delta)) * len(delta) + 1e-6
    assert bool((indices.diff() > 0).all())
    assert all(0 <= int(i) < len(delta) for i in indices)
    assert bool(torch.isfinite(released.values).all())
    assert release.bound == truncate
    if truncate is None:
        assert released.clamped_fraction == 0.0
    else:
        assert bool((released.values.abs() <= np.float32(truncate)).all())
    assert released.event == mechanism.event(Plan(len(delta)))


def test_the_order_is_drawn_anew_and_favours_nobody() -> None:
    """All entries alike, one upload of ten: each is as likely, and the upload is where the order says."""
    release = release_of(SparseVector(1e6, fraction=0.1, bound=1.0, threshold=0.1))
    delta, stream = torch.ones(10), generator()
    counts = np.zeros(10)
    for _ in range(3000):
        counts[release.release(delta, stream).indices.numpy()] += 1
    assert counts.sum() == 3000  # Far above the threshold: always one, never more.
    assert stats.chisquare(counts).pvalue > 1e-5
    first = torch.randperm(10, generator=generator(9))[0]
    assert release.release(delta, generator(9)).indices.tolist() == [int(first)]


# --- edges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [False, True])
def test_hardly_any_noise_is_selection_above_a_threshold(variant: str, exact: bool) -> None:
    delta = torch.tensor([0.0, -3e-4, 5e-5, 9.0, -9.0, 0.0])
    mechanism = SparseVector(1e9, fraction=1.0, variant=variant, exact=exact)
    released = release_of(mechanism, SecretNoise()).release(delta, generator())
    assert released.indices.tolist() == [1, 3, 4]
    assert released.values.tolist() == pytest.approx([-3e-4, 1e-3, -1e-3], abs=1e-6)
    assert released.event == SparseVectorRound(
        1e9, 6, 6, 1e-3, 1e-4, variant, exact, None if variant == "paper" else 0.5
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_huge_noise_destroys_the_signal(variant: str) -> None:
    delta = torch.where(torch.arange(2000) % 2 == 0, 1e-3, -1e-3) * (torch.arange(2000) < 1000)

    def signal(epsilon: float) -> tuple[float, float]:
        released = release_of(SparseVector(epsilon, fraction=0.25, variant=variant)).release(
            delta, generator()
        )
        right = (released.values.sign() == delta[released.indices].sign()).float().mean()
        return float((released.indices < 1000).float().mean()), float(right)

    assert signal(1e6) == (1.0, 1.0)
    inside, right = signal(1.0)
    assert (
        0.4 < inside < 0.6 and right < 0.4
    )  # By chance: one half; and half of that, for zeros have no sign.


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_update_is_asked_and_charged_like_any_other(variant: str) -> None:
    mechanism = SparseVector(1.0, fraction=0.5, variant=variant)
    released = release_of(mechanism).release(torch.zeros(100), generator())
    assert len(released.indices) > 10  # Noise alone reaches the threshold.
    silent = replace(mechanism, threshold=1e6)
    released = release_of(silent).release(torch.zeros(100), generator())
    assert released.indices.shape == released.values.shape == (0,)
    assert released.event == silent.event(Plan(100)) and released.clamped_fraction == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_update_is_released_as_noise_and_charged(bad: float) -> None:
    """Silence would tell others what is in the data, at no cost."""
    mechanism = SparseVector(1.0, fraction=1.0)
    diverged = release_of(mechanism, SeededNoise(0, simulated=True)).release(
        torch.tensor([bad, 1.0]), generator()
    )
    nothing = release_of(mechanism, SeededNoise(0, simulated=True)).release(torch.zeros(2), generator())
    assert torch.equal(diverged.indices, nothing.indices) and torch.equal(diverged.values, nothing.values)
    assert diverged.event == mechanism.event(Plan(2))


def test_truncation_counts_what_it_changed() -> None:
    delta = torch.zeros(1000)
    release = release_of(SparseVector(1.0, fraction=0.5, truncate=1e-3))
    released = release.release(delta, generator())
    at_bound = (released.values.abs() == np.float32(1e-3)).float().mean()
    assert released.clamped_fraction == pytest.approx(float(at_bound)) and at_bound > 0.9


def test_seeded_releases_repeat_and_secret_ones_do_not() -> None:
    mechanism, delta = SparseVector(1e4, fraction=0.5), torch.linspace(-1e-3, 1e-3, 100)

    def values(noise: NoiseSource) -> list[float]:
        released = release_of(mechanism, noise).release(delta, generator())
        return [*released.indices.tolist(), *released.values.tolist()]

    assert values(SeededNoise(1, simulated=True)) == values(SeededNoise(1, simulated=True))
    assert values(SeededNoise(1, simulated=True)) != values(SeededNoise(2, simulated=True))
    assert values(SecretNoise()) != values(SecretNoise())
    release = release_of(mechanism)
    assert (
        release.release(delta, generator()).values.tolist()
        != release.release(delta, generator()).values.tolist()
    )


def test_the_exact_sampler_makes_the_same_noise() -> None:
    mechanism = SparseVector(5000.0 * 3, fraction=1.0, bound=0.01, threshold=0.0, exact=True)
    delta = torch.randn(5000, generator=generator()) * 0.01
    released = release_of(mechanism, SecretNoise()).release(delta, generator())
    noise = (released.values - delta.clamp(-0.01, 0.01)[released.indices]).double().numpy()
    assert fits(noise, stats.laplace, mechanism.scales(5000).value)
    assert not fits(noise, stats.laplace, 1.2 * mechanism.scales(5000).value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": 1.0, "fraction": 1.5}, "fraction=1.5"),
        ({"epsilon": 1.0, "bound": 0}, "bound=0"),
        ({"epsilon": 1.0, "threshold": -1}, "threshold=-1"),
        ({"epsilon": 1.0, "variant": "best"}, r"variant='best' .*paper.*standard"),
        ({"epsilon": 1.0, "value_share": 1.0}, "value_share=1"),
        ({"epsilon": 1.0, "truncate": False}, "truncate=False"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta=1.0"),
        ({"epsilon": 1.0, "variant": []}, r"variant=\[\] .*paper.*standard"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SparseVector(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "1.0", "nan", True, False, []])
@pytest.mark.parametrize(
    "name", ["epsilon", "fraction", "bound", "threshold", "value_share", "truncate", "delta", "max_epsilon"]
)
def test_no_number_is_read_into_what_is_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{name}={value!r}")):
        SparseVector(**{"epsilon": 1.0, name: value})


def test_what_it_does_not_go_with_is_refused() -> None:
    mechanism, noise = SparseVector(1.0), SeededNoise(0, simulated=True)
    with pytest.raises(ConfigurationError, match=r"selection=LargestValues.*chooses the entries itself"):
        mechanism.make_release(LargestValues(0.1), None, noise)
    with pytest.raises(ConfigurationError, match=r"bound=0\.5 beside SparseVector\(bound=0\.001\)"):
        mechanism.make_release(None, 0.5, noise)
    assert mechanism.make_release(None, 0.001, noise).max_fraction(140_106) == 14_010 / 140_106
    with pytest.raises(ConfigurationError, match="seeded"):
        replace(mechanism, exact=True).make_release(None, None, noise)
    for ask in (mechanism.calibrated, mechanism.event):
        with pytest.raises(ConfigurationError, match=r"fraction=0\.1 of 9 .* selects none"):
            ask(Plan(9))
    assert mechanism.calibrated(Plan(100)) is mechanism
