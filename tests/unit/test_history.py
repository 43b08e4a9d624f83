"""A thinned past: exact where it is recent, bounded everywhere."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.records import Indices, Vector
from lightning_ppdl.server.history import History

ALL: Indices = np.arange(3)


def vector(version: int) -> Vector:
    """Entries that grow linearly, quadratically, and not at all."""
    return np.array([version, version**2, 7], dtype=np.float32)


def recorded(versions: int, horizon: int) -> History:
    history = History()
    for version in range(versions):
        history.record(version, vector(version), horizon)
    return history


def test_the_newest_versions_are_exact() -> None:
    history = recorded(100, horizon=1000)
    for version in (99, 98, 97):
        np.testing.assert_array_equal(history.at(version, ALL), vector(version))


@given(st.integers(1, 200), st.data())
def test_linear_growth_is_interpolated_exactly(versions: int, data: st.DataObject) -> None:
    history = recorded(versions, horizon=10**6)
    asked = data.draw(st.integers(0, versions - 1))
    result = history.at(asked, ALL)
    np.testing.assert_allclose(result[[0, 2]], vector(asked)[[0, 2]], rtol=1e-5)


@given(st.integers(1, 200), st.data())
def test_a_past_version_lies_between_copies_at_most_half_its_age_apart(
    versions: int, data: st.DataObject
) -> None:
    history = recorded(versions, horizon=10**6)
    asked = data.draw(st.integers(0, versions - 1))
    age = versions - 1 - asked
    # The chord of x ** 2 over a gap g is off by at most g * g / 4; the gap is at most the age of its
    # older end, halved.
    gap = age + 1
    assert abs(float(history.at(asked, ALL)[1]) - asked**2) <= gap * gap / 4 + 1e-2 * max(1, asked)


def test_copies_grow_with_the_logarithm_of_the_age() -> None:
    history = History()
    vectors = [np.full(1000, version, dtype=np.float32) for version in range(500)]
    for version, values in enumerate(vectors):
        history.record(version, values, horizon=10**6)
    assert len(history._copies) <= 4 * math.log2(500)


def test_what_is_older_than_the_horizon_is_forgotten() -> None:
    short, long = recorded(400, horizon=20), recorded(400, horizon=10**6)
    assert len(short._copies) < len(long._copies)
    # The oldest copy kept still covers the horizon.
    np.testing.assert_allclose(short.at(399 - 20, ALL)[0], 399 - 20, rtol=1e-5)


def test_versions_before_the_first_copy_are_taken_for_the_first() -> None:
    history = History()
    history.record(5, vector(5), horizon=10)
    np.testing.assert_array_equal(history.at(2, ALL), vector(5))


def test_a_copy_is_not_a_view() -> None:
    history = History()
    values = vector(1)
    history.record(0, values, horizon=10)
    values += 100
    np.testing.assert_array_equal(history.at(0, ALL), vector(1))
