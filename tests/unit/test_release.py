"""The door without noise: what it lets through, bounds and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_ppdl.errors import ConfigurationError, NonFiniteUpdateError
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.selection import LargestValues, RandomAboveThreshold

updates = hnp.arrays(
    "float32", st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(delta=updates, bound=st.sampled_from([1e-3, 0.1, 1.0, 1e9, None]))
def test_released_values_are_the_selected_ones_within_the_bound(delta: Any, bound: float | None) -> None:
    released = PlainRelease(LargestValues(1.0), bound).release(torch.from_numpy(delta), generator())
    expected = torch.from_numpy(delta)[released.indices]
    assert len(expected) == int((delta != 0).sum())
    if bound is not None:
        limit = torch.tensor(bound, dtype=torch.float32)
        assert bool((released.values.abs() <= limit).all())
        inside = expected.abs() <= limit
        assert torch.equal(released.values[inside], expected[inside])
        assert torch.equal(released.values[~inside], expected[~inside].sign() * limit)
    else:
        assert torch.equal(released.values, expected)


def test_clamped_fraction_is_over_the_released_values() -> None:
    # Two of ten leave; one of the two is beyond the bound.
    delta = torch.tensor([0.0, 5.0, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    released = PlainRelease(LargestValues(0.2), bound=1.0).release(delta, generator())
    assert released.indices.tolist() == [1, 3]
    assert released.values.tolist() == [1.0, 0.5]
    assert released.clamped_fraction == 0.5


def test_a_value_at_the_bound_is_not_clamped() -> None:
    released = PlainRelease(LargestValues(1.0), bound=0.5).release(torch.tensor([0.5, -0.5]), generator())
    assert released.values.tolist() == [0.5, -0.5]
    assert released.clamped_fraction == 0.0


@pytest.mark.parametrize("bound", [None, 0.5])
def test_a_zero_update_releases_nothing(bound: float | None) -> None:
    released = PlainRelease(LargestValues(), bound).release(torch.zeros(50), generator())
    assert len(released.indices) == len(released.values) == 0
    assert released.clamped_fraction == 0.0


@pytest.mark.parametrize(
    "bad",
    [
        [float("nan")],
        [float("inf")],
        [-float("inf")],
        [float("inf"), -float("inf")],
        # The sum of these overflows besides.
        [3e38, 3e38, float("inf")],
        [3e38, 3e38, float("nan"), -float("inf")],
    ],
)
def test_non_finite_updates_are_refused_and_counted(bad: list[float]) -> None:
    delta = torch.tensor([1.0, *bad, -1.0])
    count = int((~torch.isfinite(delta)).sum())
    with pytest.raises(NonFiniteUpdateError, match=rf"^{count} of {len(delta)} entries"):
        PlainRelease(LargestValues(1.0), bound=1.0).release(delta, generator())


def test_a_finite_update_whose_sum_overflows_is_released() -> None:
    delta = torch.tensor([3e38, 3e38, 3e38, -1.0])
    assert not torch.isfinite(delta.sum())
    released = PlainRelease(LargestValues(1.0), bound=2.0).release(delta, generator())
    assert released.values.tolist() == [2.0, 2.0, 2.0, -1.0]


def test_release_is_a_function_of_update_and_generator() -> None:
    delta = torch.randn(400, generator=generator(9))
    before = delta.clone()
    release = PlainRelease(RandomAboveThreshold(0.1, threshold=0.01), bound=0.5)
    first, again = (release.release(delta, generator(1)) for _ in range(2))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.values, again.values)
    other = release.release(delta, generator(2))
    assert not torch.equal(first.indices, other.indices)
    assert torch.equal(delta, before)


@pytest.mark.parametrize("size", [10, 99, 1000, 140_106])
def test_max_fraction_is_what_can_be_released(size: int) -> None:
    release = PlainRelease(LargestValues(0.29))
    released = release.release(torch.arange(1.0, size + 1), generator())
    assert len(released.values) / size == release.max_fraction(size)


def test_max_fraction_of_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"fraction=0\.1 of 3"):
        PlainRelease(LargestValues(0.1)).max_fraction(3)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_bad_bounds_are_named(bound: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        PlainRelease(LargestValues(), bound)
    assert f"bound={bound!r}" in str(raised.value)


def test_a_selection_that_is_none_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"selection=0\.1 must be a Selection"):
        PlainRelease(0.1)  # type: ignore[arg-type]
