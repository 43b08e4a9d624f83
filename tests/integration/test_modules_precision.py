"""Precision: the shared vector is float32, modules may compute in another or hold their parameters in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from strategy_harness import (
    BATCHES,
    Ends,
    Optimized,
    Tiny,
    add_server,
    beside_plain,
    everything,
    fit,
    flat,
    one_thread,
    require_alike,
    rounds,
    steps_at_ends,
    url,
)

from lightning_ppdl.errors import FingerprintMismatchError

__all__ = ["one_thread", "url"]


def sgd(module: Tiny) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.1, 0.9)


def adam(module: Tiny) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), 0.02)


@pytest.mark.parametrize(("configure", "round_length"), [(sgd, 2), (adam, "epoch")])
@pytest.mark.parametrize(
    ("precision", "held"),
    [
        ("16-mixed", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_every_precision_is_plain_training(
    url: str, precision: Any, held: torch.dtype, configure: Any, round_length: Any
) -> None:
    own = {"round_length": round_length}
    _, module = beside_plain(url, lambda: Optimized(configure), own=own, precision=precision)
    assert {p.dtype for p in module.parameters()} == {held}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_is_kept_to_the_bit(url: str, precision: Any) -> None:
    """float32 holds every change between two of its values, and their sum rounds to where it came from."""
    expected, module = Tiny(), Tiny()
    fit(expected, precision=precision, epochs=5)
    fit(module, everything(url, round_length=2), precision=precision, epochs=5)
    assert torch.equal(flat(module), flat(expected))


def test_what_half_precision_cannot_hold_stays_at_the_server(url: str) -> None:
    """The server's values are finer than the participant's: its change is added to them, none is rounded."""
    fine = np.random.default_rng(0).uniform(-1, 1, 34).astype(np.float32)
    rounded = torch.from_numpy(fine).bfloat16()
    server, module, expected = add_server(url, initial=fine), Tiny(), Tiny()
    torch.nn.utils.vector_to_parameters(rounded.float(), expected.parameters())
    fit(expected, precision="bf16-true", epochs=1)
    fit(module, everything(url), precision="bf16-true", epochs=1)
    assert torch.equal(flat(module), flat(expected))
    change = flat(expected) - rounded.float()
    require_alike(torch.from_numpy(server.parameters()), torch.from_numpy(fine) + change, 1e-7)
    assert np.abs(fine - rounded.float().numpy()).max() > 1e-3


def test_doubles_lose_what_float32_cannot_hold_and_no_more(url: str) -> None:
    expected, module = Tiny(), Tiny()
    fit(expected, precision="64-true")
    fit(module, everything(url), precision="64-true")
    ours, theirs = (torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (module, expected))
    assert ours.dtype == torch.float64
    assert 0 < (ours - theirs).abs().max() < 1e-6


def test_participants_that_compute_in_another_precision_collaborate(url: str) -> None:
    """Mixed precision holds float32 parameters, like 32-true: the second goes on from the first's values."""
    server, first, second = add_server(url), Tiny(), Tiny()
    fit(first, everything(url), epochs=1, precision="bf16-mixed")
    fit(second, everything(url, "ben"), epochs=1)
    expected = Tiny()
    fit(expected, epochs=1, precision="bf16-mixed")
    fit(expected, epochs=1)
    require_alike(torch.from_numpy(server.parameters()), flat(expected))
    assert not torch.equal(flat(first), flat(second))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_participants_that_hold_another_precision_are_refused(url: str, precision: Any) -> None:
    fit(Tiny(), everything(url), epochs=1)
    dtype = {"bf16-true": "bfloat16", "64-true": "float64"}[precision]
    with pytest.raises(FingerprintMismatchError, match=rf"'backbone\.weight'.*{dtype}"):
        fit(Tiny(), everything(url, "ben"), epochs=1, precision=precision)


def scaled(initial: float) -> MixedPrecision:
    """fp16 with a loss scale; by name, Lightning would put bfloat16 in its place on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=4)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("configure", [sgd, adam])
@pytest.mark.parametrize(("round_length", "accumulate"), [("epoch", 1), (1, 1), (2, 3)])
def test_loss_scaling_and_the_steps_that_it_skips(
    url: str, configure: Any, round_length: Any, accumulate: int
) -> None:
    """The first scales overflow: steps go by that change nothing, and are counted; then it grows again."""
    made, _ = beside_plain(
        url,
        lambda: Optimized(configure),
        own={"round_length": round_length},
        callbacks=[Ends(url)],
        plugins=[scaled(2.0**20)],
        accumulate_grad_batches=accumulate,
    )
    scaler = made.precision_plugin.scaler  # type: ignore[attr-defined]
    steps = 3 * BATCHES // accumulate
    assert made.global_step == steps and scaler.get_scale() != 2.0**20
    if configure is adam:
        assert int(next(iter(made.optimizers[0].state.values()))["step"]) < steps
    if round_length == 1:
        assert steps_at_ends(made) == list(range(1, steps + 1))
        assert rounds(made)[0].released_values == 0 and rounds(made)[-1].released_values > 0
