"""Noise: of the right size and shape, secret where it must be, repeatable where it may be, ready in time."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from auditing import Floats, fits
from scipy import stats

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.noise import NoiseAhead, NoiseSource, SecretNoise, SeededNoise
from lightning_ppdl.privacy.samplers import (
    ExactSampler,
    FastSampler,
    Sampler,
    grid_below,
    make_sampler,
    on_grid,
)


def seeded(*labels: str | int) -> SeededNoise:
    return SeededNoise(0, *labels, simulated=True)


@pytest.mark.parametrize("make", [SecretNoise, seeded])
def test_noise_is_of_its_size_and_nothing_5_percent_off_is(make: Callable[[], NoiseSource]) -> None:
    noise = make()
    for samples, distribution in [
        (noise.laplace(60_000), stats.laplace),
        (noise.gaussian(60_000), stats.norm),
    ]:
        assert fits(samples, distribution, 1.0)
        assert not fits(samples, distribution, 1.05)
        assert not fits(samples, distribution, 0.95)
    assert not fits(noise.gaussian(60_000), stats.laplace, 1.0)
    uniform = noise.uniform(60_000)
    assert stats.kstest(uniform, stats.uniform.cdf).pvalue > 1e-5
    assert stats.kstest(1.05 * uniform, stats.uniform.cdf).pvalue < 1e-5
    assert uniform.min() >= 0 and uniform.max() < 1


@pytest.mark.parametrize("sampler", [FastSampler(seeded("sampler")), ExactSampler()], ids=["fast", "exact"])
def test_samplers_scale_their_noise(sampler: Sampler) -> None:
    scale = 0.037
    grid = sampler.grid(unit=0.001, scale=scale)
    for draw, distribution in [(sampler.laplace, stats.laplace), (sampler.gaussian, stats.norm)]:
        samples = draw(20_000, scale, grid)
        assert fits(samples, distribution, scale)
        assert not fits(samples, distribution, 1.05 * scale)
        assert not fits(samples, distribution, 0.95 * scale)
        if grid:
            assert np.array_equal(np.rint(samples / grid), samples / grid)
        assert draw(0, scale, grid).shape == (0,)


def test_the_exact_sampler_puts_data_on_its_grid_and_never_outwards() -> None:
    sampler = ExactSampler()
    grid = sampler.grid(unit=0.001, scale=20.0)
    assert 0.001 * 2**-21 < grid <= 0.001 * 2**-20
    values = np.array([0.001, -0.001, 0.7 * grid, -1.9 * grid, 0.0])
    placed = sampler.place(values, grid)
    assert np.all(np.abs(placed) <= np.abs(values)) and np.all(np.abs(placed - values) < grid)
    assert placed[2:].tolist() == [0.0, -grid, 0.0]
    # However large the noise, sums stay whole multiples in float64.
    assert 1e12 * 2**-41 < sampler.grid(unit=0.001, scale=1e12) <= 1e12 * 2**-40


def test_exact_noise_cannot_be_seeded() -> None:
    with pytest.raises(ConfigurationError, match=r"exact=True .* seeded.*SecretNoise"):
        make_sampler(seeded(), exact=True)
    assert isinstance(make_sampler(SecretNoise(), exact=True), ExactSampler)
    assert isinstance(make_sampler(seeded(), exact=False), FastSampler)


def test_what_is_released_lies_on_a_public_grid() -> None:
    scale = 0.3
    grid = grid_below(scale)
    assert np.log2(grid) == np.rint(np.log2(grid)) and scale * 2**-21 < grid <= scale * 2**-20
    values = seeded().laplace(10_000) * scale
    placed = on_grid(values.copy(), scale)
    assert np.array_equal(placed / grid, np.rint(placed / grid))
    assert np.abs(placed - values).max() <= grid / 2
    assert np.array_equal(placed.astype(np.float32), placed)  # float32 changes nothing more
    assert not np.signbit(on_grid(np.array([-0.1 * grid]), scale)).any()
    assert np.isfinite(on_grid(np.array([1.0]), 1e-300)).all()


def test_seeded_noise_repeats_by_its_labels() -> None:
    first = seeded("clinic", 1).gaussian(5)
    assert np.array_equal(first, seeded("clinic", 1).gaussian(5))
    assert np.array_equal(seeded("clinic").spawn(1).gaussian(5), first)
    for other in [
        seeded("clinic", 2),
        seeded("clinic", "1"),
        seeded(),
        SeededNoise(1, "clinic", 1, simulated=True),
    ]:
        assert not np.isin(other.gaussian(5), first).any()
    assert seeded().simulated and not SecretNoise().simulated


@pytest.mark.parametrize("simulated", [False, None, 1])
def test_seeded_noise_must_be_owned_up_to(simulated: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"simulated=True.*SecretNoise"):
        SeededNoise(0, simulated=simulated)
    with pytest.raises(ConfigurationError, match="simulated=True"):
        SeededNoise(0)


def test_secret_noise_never_repeats() -> None:
    source = SecretNoise()
    drawn = [source.gaussian(5), source.gaussian(5), SecretNoise().gaussian(5), source.spawn("a").gaussian(5)]
    drawn.append(source.spawn("a").gaussian(5))
    assert len(np.unique(np.concatenate(drawn))) == 25


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_secret_noise_is_neither_pickled_nor_copied(copied: Callable[[object], object]) -> None:
    source = SecretNoise()
    for holder in (source, {"state": [source]}, NoiseAhead(source, 3)):
        if copied is copy.copy and holder is not source:
            continue  # A shallow copy of a container shares the source, which is no copy of it.
        with pytest.raises(TypeError, match="SecretNoise can be neither pickled nor copied"):
            copied(holder)
    assert not hasattr(source, "state_dict")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "randomgen", None)
    monkeypatch.setitem(sys.modules, "opendp.prelude", None)
    with pytest.raises(ConfigurationError, match=r"lightning_ppdl\[privacy\]"):
        SecretNoise()
    with pytest.raises(ConfigurationError, match=r"lightning_ppdl\[exact\]"):
        ExactSampler()


def in_a_fork(draw: Callable[[], Floats]) -> Floats:
    """What ``draw`` returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, draw().tobytes())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        received = pipe.read()
    os.waitpid(child, 0)
    return np.frombuffer(received)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("make", [SecretNoise, seeded])
def test_a_forked_child_draws_other_noise(make: Callable[[], NoiseSource]) -> None:
    source, ahead = make(), NoiseAhead(make().spawn("ahead"), 4)
    source.gaussian(1)
    ahead.gaussian()
    draws: list[Callable[[], Floats]] = [lambda: source.gaussian(4), ahead.gaussian]
    for draw in draws:
        child = in_a_fork(draw)
        parent = draw()
        assert child.shape == (4,) and not np.isin(child, parent).any()


def test_many_threads_share_a_source() -> None:
    source = SecretNoise()
    drawn: list[Floats] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend(source.laplace(1000) for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(np.unique(np.concatenate(drawn))) == 4 * 50 * 1000


def noise_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("noise")}


def test_noise_ahead_is_the_sources_noise_in_order() -> None:
    ahead = NoiseAhead(seeded("ahead"), 7)
    blocks = [ahead.gaussian() for _ in range(5)]
    assert np.array_equal(np.concatenate(blocks), seeded("ahead").gaussian(35))
    blocks[0][:] = 0  # The caller's own.
    assert ahead.gaussian().all()


def test_noise_ahead_leaves_no_thread() -> None:
    others = noise_threads()
    ahead = NoiseAhead(seeded(), 3)
    assert noise_threads() <= others  # None until it is needed.
    ahead.gaussian()
    (thread,) = noise_threads() - others
    ahead.close()
    assert not thread.is_alive()
    assert ahead.gaussian().shape == (3,)  # Starts again.
    (thread,) = noise_threads() - others
    del ahead
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_noise_ahead_passes_errors_on() -> None:
    class Broken(SeededNoise):
        def gaussian(self, count: int) -> Floats:
            raise OSError("no entropy")

    with pytest.raises(OSError, match="no entropy"):
        NoiseAhead(Broken(0, simulated=True), 3).gaussian()
    with pytest.raises(ConfigurationError, match="count=0"):
        NoiseAhead(seeded(), 0)
