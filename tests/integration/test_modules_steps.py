"""How batches become steps: accumulation, clipping, and batches that give no gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from strategy_harness import (
    BATCHES,
    Ends,
    Tiny,
    add_server,
    beside_plain,
    everything,
    fit,
    flat,
    one_thread,
    rounds,
    steps_at_ends,
    url,
)

__all__ = ["one_thread", "url"]

LR = 0.1


class Plain(Tiny):
    """Without momentum: a step is the learning rate times the gradient, so that steps can be checked."""

    def __init__(self) -> None:
        super().__init__(momentum=0.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), LR)


@pytest.mark.parametrize(
    ("round_length", "ends"),
    [
        # 6, then 3, then 2 steps an epoch: a batch each, two, and four and the two that are left
        ("epoch", [6, 9, 11]),
        (1, list(range(1, 12))),
        (2, [2, 4, 6, 8, 10, 11]),
        (4, [4, 8, 11]),
    ],
)
def test_accumulation_that_changes_over_the_epochs(url: str, round_length: Any, ends: list[int]) -> None:
    """A round of n steps counts steps and not batches, and goes on over the end of an epoch."""
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), Ends(url)]
    made, _ = beside_plain(url, Tiny, own={"round_length": round_length}, callbacks=callbacks)
    assert steps_at_ends(made) == ends


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(("round_length", "accumulate"), [("epoch", 3), (1, 1)])
def test_clipping_is_the_trainers(url: str, algorithm: Any, round_length: Any, accumulate: int) -> None:
    settings: dict[str, Any] = {
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": algorithm,
        "accumulate_grad_batches": accumulate,
    }
    made, module = beside_plain(
        url, lambda: Tiny(lr=0.5), own={"round_length": round_length}, epochs=4, **settings
    )
    assert made.global_step == 4 * BATCHES / accumulate
    unclipped = Tiny(lr=0.5)
    fit(unclipped, epochs=4, accumulate_grad_batches=accumulate)
    assert (flat(module) - flat(unclipped)).abs().max() > 0.1


def test_what_is_shared_of_a_clipped_step_is_clipped(url: str) -> None:
    """A round a step: by norm every update has the length of the clip, by value none has a larger entry."""
    by_norm = fit(Plain(), everything(url, round_length=1), gradient_clip_val=0.02)
    assert [report.update_norm for report in rounds(by_norm)] == pytest.approx(
        [LR * 0.02] * 3 * BATCHES, rel=1e-3
    )
    server, module = add_server(f"{url}-value", initial=flat(Plain()).numpy()), Plain()
    settings: dict[str, Any] = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
    fit(module, everything(f"{url}-value", round_length=1), epochs=1, limit_train_batches=1, **settings)
    moved = np.abs(server.parameters() - flat(Plain()).numpy())
    assert moved.max() == pytest.approx(LR * 0.02, rel=1e-3)
    assert (moved > 0.99 * LR * 0.02).sum() > 5


class OwnClipping(Plain):
    """Steps by the gradient's sign."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.sign_()


def test_clipping_of_the_modules_own(url: str) -> None:
    beside_plain(url, OwnClipping)
    server, module = add_server(f"{url}-one", initial=flat(OwnClipping()).numpy()), OwnClipping()
    fit(module, everything(f"{url}-one"), epochs=1, limit_train_batches=1)
    np.testing.assert_allclose(np.abs(server.parameters() - flat(Plain()).numpy()), LR, rtol=1e-4)


class Choosy(Tiny):
    """Has no loss for some batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (0, 3, 5) else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("round_length", ["epoch", 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss(url: str, round_length: Any, accumulate: int) -> None:
    """Among them the first of a round and its last."""
    made, _ = beside_plain(
        url, Choosy, own={"round_length": round_length}, accumulate_grad_batches=accumulate
    )
    if (round_length, accumulate) == (1, 1):
        shared = [report.released_values > 0 for report in rounds(made)]
        # A step without a gradient counts, and changes nothing: a round of it shares nothing.
        assert shared == [False, True, True, False, True, False] * 3
