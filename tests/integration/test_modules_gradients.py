"""Sharing gradients, whatever stands between the backward pass and the local step."""

from __future__ import annotations

import functools
from typing import Any, cast

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.plugins.precision import MixedPrecision
from strategy_harness import (
    BATCHES,
    Optimized,
    Tiny,
    Words,
    add_server,
    everything,
    fit,
    flat,
    loader,
    one_thread,
    require_alike,
    rounds,
    url,
)
from torch import nn

from lightning_ppdl import ServerOptimizer

__all__ = ["one_thread", "url"]

LR = 0.05


def sgd(module: Tiny) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), LR)


def server_sgd(url: str, **settings: Any) -> Any:
    return add_server(url, merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=LR)), **settings)


def fp16(scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def require_same_as_changes(url: str, make: Any, own: Any = None, settings: Any = dict, **common: Any) -> Any:
    """Local SGD and the server's have one rate: the sum of the gradients is what the parameters moved by."""
    own = own or {}
    changes, gradients = add_server(f"{url}-change"), server_sgd(f"{url}-gradient")
    fit(make(), everything(f"{url}-change", **own), **settings(), **common)
    made = fit(make(), everything(f"{url}-gradient", quantity="gradient", **own), **settings(), **common)
    require_alike(torch.from_numpy(gradients.parameters()), torch.from_numpy(changes.parameters()))
    assert np.abs(changes.parameters() - flat(make()).numpy()).max() > 0.01
    return made


SETTINGS: dict[str, Any] = {
    "accumulation": lambda: {"accumulate_grad_batches": 4},
    "changing accumulation": lambda: {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-mixed, accumulated": lambda: {"precision": "bf16-mixed", "accumulate_grad_batches": 3},
    "64-true": lambda: {"precision": "64-true"},
    "fp16": lambda: {"plugins": [fp16()]},
    "fp16, accumulated": lambda: {"plugins": [fp16()], "accumulate_grad_batches": 3},
    "fp16, the first steps skipped": lambda: {"plugins": [fp16(2.0**20)]},
}


@pytest.mark.parametrize("round_length", ["epoch", 2])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_gradients_add_up_to_changes(url: str, name: str, round_length: Any) -> None:
    own = {"round_length": round_length}
    require_same_as_changes(url, lambda: Optimized(sgd), own, SETTINGS[name])


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (functools.partial(torch.optim.Adam, lr=0.02), {}),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"accumulate_grad_batches": 2}),
        (functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1), {"precision": "bf16-mixed"}),
    ],
)
def test_a_server_that_steps_as_often_is_plain_training(url: str, optimizer: Any, settings: Any) -> None:
    """With a round a step the server's optimizer is the only one that counts, whatever the local one does."""
    server = add_server(url, merge=ServerOptimizer(optimizer))
    expected, made = Optimized(lambda module: optimizer(module.parameters())), None
    fit(expected, **settings)
    strategy = everything(url, quantity="gradient", round_length=1)
    made = fit(Optimized(lambda m: torch.optim.Adagrad(m.parameters(), 0.3)), strategy, **settings)
    assert len(rounds(made)) == made.global_step
    require_alike(torch.from_numpy(server.parameters()), flat(expected))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_taken_before_clipping(url: str, algorithm: str, accumulate: int) -> None:
    """The local steps are tiny; the server hears the whole gradient."""
    server = server_sgd(url, initial=flat(Tiny()).numpy())
    settings: dict[str, Any] = {"gradient_clip_val": 1e-6, "gradient_clip_algorithm": algorithm}
    made = fit(
        Optimized(sgd),
        everything(url, quantity="gradient"),
        accumulate_grad_batches=accumulate,
        epochs=1,
        **settings,
    )
    module, total = Tiny(), torch.zeros(34)
    for batch in loader():  # clipped steps leave the parameters where they are, to six digits
        module.zero_grad()
        module.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
        total += torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])
    require_alike(torch.from_numpy(server.parameters()), flat(Tiny()) - LR * total / accumulate, 1e-5)
    assert rounds(made)[0].update_norm == pytest.approx(float(total.norm()) / accumulate, rel=1e-3)


def test_gradients_of_half_precision_are_summed_in_single(url: str) -> None:
    """Against the loop written by hand: the module rounds the server's values, the server does not."""
    fine = np.random.default_rng(0).uniform(-1, 1, 34).astype(np.float32)
    server = server_sgd(url, initial=fine)
    strategy = everything(url, quantity="gradient", round_length=1)
    fit(Optimized(sgd), strategy, epochs=1, precision="bf16-true")
    module, vector = Tiny().bfloat16(), torch.from_numpy(fine).clone()
    for batch in loader():
        nn.utils.vector_to_parameters(vector.bfloat16(), module.parameters())
        module.zero_grad()
        module.training_step([x.bfloat16() for x in batch], 0).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        vector -= LR * torch.cat([gradient.float().reshape(-1) for gradient in gradients])
    require_alike(torch.from_numpy(server.parameters()), vector)


class ByHand(Tiny):
    """Two optimizers; accumulates over two batches, and clips the head's gradient before its step."""

    def __init__(self, clip: float | None) -> None:
        super().__init__()
        self.clip = clip
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        backbone, head = cast(Any, self.optimizers())
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            if self.clip is not None:
                self.clip_gradients(head, self.clip, "norm")
            for optimizer in (backbone, head):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), LR) for part in (self.backbone, self.head)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
@pytest.mark.parametrize(("clip", "round_length"), [(None, 4), (0.05, "epoch")])
def test_manual_optimization(url: str, clip: float | None, precision: Any, round_length: Any) -> None:
    """What a module does to its gradients before it calls ``step`` is part of them, clipping too."""
    settings = (lambda: {"plugins": [fp16()]}) if precision == "fp16" else (lambda: {"precision": precision})
    made = require_same_as_changes(url, lambda: ByHand(clip), {"round_length": round_length}, settings)
    assert made.global_step == 3 * BATCHES  # half as many, for each of two optimizers


@pytest.mark.parametrize("settings", [dict, lambda: {"plugins": [fp16()]}])
def test_sparse_gradients(url: str, settings: Any) -> None:
    made = require_same_as_changes(url, lambda: Words(sgd), settings=settings)
    # The two words that occur, of 50.
    assert {report.released_values for report in rounds(made)} == {34 + 2 * 5}


@pytest.mark.parametrize("scale", [1024.0, 2.0**20])
def test_an_optimizer_that_takes_the_loss_scale_off_itself(url: str, scale: float) -> None:
    """Fused ones do: the gradients that they are handed are scaled, what is shared must not be."""
    fused = lambda m: torch.optim.SGD(m.parameters(), LR, fused=True)  # noqa: E731
    require_same_as_changes(url, lambda: Optimized(fused), settings=lambda: {"plugins": [fp16(scale)]})
