"""Partial downloads: which entries, and that what arrives is what the server has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import Download, DownloadRequest, Vector
from lightning_ppdl.server.download import ChangedSince, DownloadCriterion, MostRecent, MostUpdated, read
from lightning_ppdl.server.store import Change, MemoryStore
from lightning_ppdl.wire import encode_download


def commit(store: MemoryStore, indices: Any, decay: float = 1.0) -> None:
    where = np.asarray(indices, np.int64)
    store.commit(Change(where, np.ones(len(where), np.float32)), where, decay)


def ask(
    store: MemoryStore,
    criterion: DownloadCriterion,
    fraction: float,
    known: int | None = 0,
    seed: int = 0,
) -> Download:
    return read(store, DownloadRequest(fraction, known), criterion, np.random.default_rng(seed))


def chosen(download: Download) -> list[int]:
    assert download.indices is not None
    assert download.indices.dtype == np.int64
    return [int(i) for i in download.indices]


def after(held: Vector, download: Download) -> Vector:
    """What a participant that holds ``held`` has after ``download``."""
    if download.indices is None:
        return download.values
    result = np.array(held)
    result[download.indices] = download.values
    return result


def uploads(seed: int, count: int, size: int) -> list[Any]:
    stream = np.random.default_rng(seed)
    return [np.flatnonzero(stream.random(size) < stream.random()) for _ in range(count)]


@given(seed=st.integers(0, 2**32), decay=st.sampled_from([1.0, 0.9, 0.5]), fraction=st.floats(0.05, 0.95))
def test_most_updated_is_the_largest_decayed_stat(seed: int, decay: float, fraction: float) -> None:
    size = 30
    store, stat = MemoryStore(np.zeros(size, np.float32)), np.zeros(size)
    for indices in uploads(seed, 12, size):
        commit(store, indices, decay)
        stat *= decay
        stat[indices] += 1
    indices = chosen(ask(store, MostUpdated(decay), fraction))
    assert indices == sorted(set(indices))
    assert len(indices) == max(1, int(fraction * size + 1e-6))
    left = np.setdiff1d(np.arange(size), indices)
    # Nothing left behind has a larger stat, up to float32's rounding.
    assert stat[left].max() <= stat[indices].min() + 1e-4


def test_decay_is_right_however_long_it_goes_on() -> None:
    """Far past where the growing increment that stands for the decay has to be scaled back."""
    size, decay = 40, 0.9
    store, stat = MemoryStore(np.zeros(size, np.float32)), np.zeros(size)
    for step, indices in enumerate(uploads(1, 2500, size)):
        commit(store, indices, decay)
        stat *= decay
        stat[indices] += 1
        if step % 50 == 0:
            scale = store.stat.max() / stat.max()
            np.testing.assert_allclose(store.stat / scale, stat, atol=1e-4 * stat.max())
            indices = chosen(ask(store, MostUpdated(decay), 0.25))
            left = np.setdiff1d(np.arange(size), indices)
            assert stat[left].max() <= stat[indices].min() * (1 + 1e-4)
    assert np.isfinite(store.stat).all()


@pytest.mark.parametrize("decay", [1e-3, 1e-30])
def test_extreme_decay_ranks_the_last_upload_first(decay: float) -> None:
    store = MemoryStore(np.zeros(10, np.float32))
    for index in [3, 3, 3, 3, 7, 1, 1, 5]:
        commit(store, [index], decay)
    assert chosen(ask(store, MostUpdated(decay), 0.1)) == [5]
    assert np.isfinite(store.stat).all()


def test_decay_prefers_recent_uploads() -> None:
    for decay, expected in ((1.0, [0]), (0.5, [1])):
        store = MemoryStore(np.zeros(10, np.float32))
        for index in (0, 0, 0, 1, 1):
            commit(store, [index], decay)
        assert chosen(ask(store, MostUpdated(decay), 0.1)) == expected


def test_most_recent() -> None:
    store = MemoryStore(np.zeros(10, np.float32))
    for index in (4, 4, 4, 9, 2, 7):
        commit(store, [index])
    assert chosen(ask(store, MostRecent(), 0.1)) == [7]
    assert chosen(ask(store, MostRecent(), 0.3)) == [2, 7, 9]


def test_changed_since_sends_nothing_else() -> None:
    store = MemoryStore(np.zeros(10, np.float32))
    for index in (4, 4, 4, 9, 2, 2, 7):
        commit(store, [index])
    assert chosen(ask(store, ChangedSince(), 0.9, known=3)) == [2, 7, 9]
    assert chosen(ask(store, ChangedSince(), 0.1, known=3)) == [2]
    download = ask(store, ChangedSince(), 0.5, known=7)
    assert chosen(download) == [] and len(download.values) == 0
    assert chosen(ask(store, ChangedSince(), 0.4, known=0)) == [2, 4, 7, 9]


@pytest.mark.parametrize("criterion", [MostUpdated(), MostRecent(), ChangedSince()])
def test_ties_are_drawn_evenly_and_repeatably(criterion: DownloadCriterion) -> None:
    size, draws = 20, 4000
    store = MemoryStore(np.zeros(size, np.float32))
    commit(store, range(size))
    counts = Counter(i for seed in range(draws) for i in chosen(ask(store, criterion, 0.25, seed=seed)))
    expected = draws / 4
    statistic = sum((counts[i] - expected) ** 2 for i in range(size)) / (expected * 0.75)
    # 19 degrees of freedom: beyond 45 with probability below 1e-3; always the same five give 60,000.
    assert statistic < 45
    assert chosen(ask(store, criterion, 0.25, seed=3)) == chosen(ask(store, criterion, 0.25, seed=3))


def test_values_are_the_servers() -> None:
    store = MemoryStore(np.arange(10, dtype=np.float32))
    commit(store, [2, 5])
    download = ask(store, MostUpdated(), 0.2)
    assert not download.complete and download.version == 1
    assert chosen(download) == [2, 5] and download.values.tolist() == [3.0, 6.0]


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("known", [None, 100])
def test_the_first_download_is_complete(fraction: float, known: int | None) -> None:
    """So is one after a version that this server never had."""
    store = MemoryStore(np.arange(10, dtype=np.float32))
    commit(store, [1])
    download = ask(store, MostUpdated(), fraction, known)
    assert download.complete and download.indices is None
    np.testing.assert_array_equal(download.values, store.parameters)


def test_at_least_one_entry_is_downloaded() -> None:
    store = MemoryStore(np.zeros(10, np.float32))
    commit(store, [6])
    assert chosen(ask(store, MostUpdated(), 1e-9)) == [6]


@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 7, 200]), density=st.floats(0, 1))
def test_a_complete_download_over_the_held_version_is_the_servers_vector(
    seed: int, size: int, density: float
) -> None:
    stream = np.random.default_rng(seed)
    store = MemoryStore(stream.standard_normal(size).astype(np.float32))
    held, known = store.parameters.copy(), 0
    for _ in range(6):
        for _ in range(int(stream.integers(0, 3))):
            where = np.flatnonzero(stream.random(size) < density * stream.random())
            values = stream.standard_normal(len(where)).astype(np.float32)
            store.commit(Change(where, values), where, 1.0)
        download = ask(store, MostUpdated(), 1.0, known)
        assert download.complete
        held, known = after(held, download), download.version
        np.testing.assert_array_equal(held, store.parameters)


@pytest.mark.parametrize("changed", [0, 1, 600, 666, 667, 700, 990, 1000])
def test_the_smaller_of_sparse_and_dense_is_sent(changed: int) -> None:
    size = 1000
    store = MemoryStore(np.zeros(size, np.float32))
    stream = np.random.default_rng(0)
    where = np.sort(stream.choice(size, changed, replace=False))
    store.commit(Change(where, stream.standard_normal(changed).astype(np.float32)), where, 1.0)
    sent = ask(store, MostUpdated(), 1.0, known=0)
    sparse = np.flatnonzero(store.changed_at > 0)
    as_sparse = len(encode_download(Download(1, sparse, store.parameters[sparse], True)))
    as_dense = len(encode_download(Download(1, None, store.parameters, True)))
    # Decided without encoding both.
    assert len(encode_download(sent)) <= 1.1 * min(as_sparse, as_dense)
    if 10 * changed < 9 * size:
        assert sent.indices is not None and as_sparse < as_dense
    if changed == size:
        assert sent.indices is None


def test_dense_changes_are_downloaded_too() -> None:
    """A merge rule with momentum changes entries that nobody uploaded."""
    store = MemoryStore(np.zeros(4, np.float32))
    store.commit(Change(None, np.arange(4, dtype=np.float32)), np.array([1]), 1.0)
    np.testing.assert_array_equal(after(np.zeros(4, np.float32), ask(store, MostUpdated(), 1.0)), range(4))
    assert chosen(ask(store, MostUpdated(), 0.25)) == [1]


@pytest.mark.parametrize("decay", [0, -0.5, 1.01, float("nan"), "1", True])
def test_bad_decays_are_named(decay: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        MostUpdated(decay)
    assert f"decay={decay!r}" in str(raised.value)
