"""Optimizers and schedulers hold state of their own: rounds neither reset it nor mix it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategy_harness import (
    BATCHES,
    Optimized,
    Tiny,
    add_server,
    beside_plain,
    everything,
    flat,
    loader,
    one_thread,
    require_alike,
    together,
    trainer,
    url,
)
from torch.optim import lr_scheduler

from lightning_ppdl import RoundRobin

__all__ = ["one_thread", "url"]


def adam(module: Tiny) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), 0.02)


OPTIMIZERS: dict[str, Callable[[Tiny], torch.optim.Optimizer]] = {
    "adam": adam,
    "adamw-amsgrad": lambda m: torch.optim.AdamW(m.parameters(), 0.02, weight_decay=0.1, amsgrad=True),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), 0.05, 0.9, nesterov=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.01, momentum=0.5, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.05),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3),
}


def tolerance(name: str) -> float:
    """LBFGS divides by differences of gradients, and enlarges what sums in float32 round off."""
    return 1e-4 if name == "lbfgs" else 1e-6


@pytest.mark.parametrize("round_length", ["epoch", 2])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_what_an_optimizer_remembers_outlasts_the_downloads(url: str, name: str, round_length: Any) -> None:
    made, _ = beside_plain(
        url,
        lambda: Optimized(OPTIMIZERS[name]),
        own={"round_length": round_length},
        tolerance=tolerance(name),
    )
    if name.startswith("adam"):
        assert [int(state["step"]) for state in made.optimizers[0].state.values()] == [3 * BATCHES] * 4


@pytest.mark.parametrize("round_length", ["epoch", 2])
@pytest.mark.parametrize("name", ["adam", "nesterov", "lbfgs"])
def test_two_participants_with_an_optimizer_each(url: str, name: str, round_length: Any) -> None:
    """Against the loop written by hand: each trains in turn from the shared values, with its own state."""
    length = BATCHES if round_length == "epoch" else round_length
    shared, seeds = Tiny(), (3, 4)
    by_hand = [Optimized(OPTIMIZERS[name]) for _ in seeds]
    optimizers = [module.configure_optimizers() for module in by_hand]
    batches = [itertools.cycle(loader(seed)) for seed in seeds]
    vector = flat(shared)
    for _ in range(2 * BATCHES // length):
        for module, optimizer, stream in zip(by_hand, optimizers, batches, strict=True):
            torch.nn.utils.vector_to_parameters(vector.clone(), module.parameters())
            for batch in itertools.islice(stream, length):

                def closure(module: Tiny = module, batch: Any = batch) -> Any:
                    module.zero_grad()
                    loss = module.training_step(batch, 0)
                    loss.backward()  # type: ignore[no-untyped-call]
                    return loss

                optimizer.step(closure)
            vector = flat(module)

    participants = ["anna", "ben"]
    server = add_server(url, protocol=RoundRobin(), members=participants, initial=flat(shared).numpy())
    modules = [Optimized(OPTIMIZERS[name]) for _ in seeds]
    trainers = [trainer(everything(url, who, round_length=round_length), epochs=2) for who in participants]
    together(
        lambda: trainers[0].fit(modules[0], loader(seeds[0])),
        lambda: trainers[1].fit(modules[1], loader(seeds[1])),
    )
    require_alike(torch.from_numpy(server.parameters()), vector, tolerance(name))
    for made, optimizer in zip(trainers, optimizers, strict=True):
        require_alike(made.optimizers[0].state_dict(), optimizer.state_dict(), tolerance(name))


def scheduled(
    make: Callable[[torch.optim.Optimizer], Any], **settings: Any
) -> Callable[[Tiny], dict[str, Any]]:
    def configure(module: Tiny) -> dict[str, Any]:
        optimizer = adam(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **settings}}

    return configure


SCHEDULES: dict[str, tuple[Callable[[Tiny], Any], dict[str, Any]]] = {
    "by-epoch": (scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5)), {}),
    "every-second-epoch": (scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5), frequency=2), {}),
    "by-step": (
        scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=18), interval="step"),
        {},
    ),
    "every-fourth-step": (
        scheduled(lambda o: lr_scheduler.StepLR(o, 1, 0.7), interval="step", frequency=4),
        {},
    ),
    "warm-up-by-accumulated-step": (
        scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 9), interval="step"),
        {"accumulate_grad_batches": 2},
    ),
}


@pytest.mark.parametrize("round_length", ["epoch", 4])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_go_by_the_trainers_clock_not_by_rounds(url: str, name: str, round_length: Any) -> None:
    configure, settings = SCHEDULES[name]
    made, module = beside_plain(
        url, lambda: Optimized(configure), own={"round_length": round_length}, **settings
    )
    first = configure(module)["optimizer"].param_groups[0]["lr"]
    assert made.optimizers[0].param_groups[0]["lr"] != pytest.approx(first)


@pytest.mark.parametrize("round_length", ["epoch", 4])
def test_a_plateau_is_seen_after_validation(url: str, round_length: Any) -> None:
    """A threshold that no epoch meets: the rate is halved after the second and after the third."""
    configure = scheduled(
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.9),
        monitor="val_loss",
    )
    made, _ = beside_plain(url, lambda: Optimized(configure), own={"round_length": round_length})
    plain = trainer()
    expected = Optimized(configure)
    plain.fit(expected, loader(), loader(2))
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 / 4)
    best, other = (of.lr_scheduler_configs[0].scheduler.best for of in (made, plain))  # type: ignore[union-attr]
    assert best == pytest.approx(other, rel=1e-5)


def two_groups(module: Tiny) -> Any:
    optimizer = torch.optim.AdamW(
        [
            {"params": module.backbone.parameters(), "lr": 0.001, "weight_decay": 0.5},
            {"params": module.head.parameters(), "lr": 0.05},
        ]
    )
    return [optimizer], [lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 1.0])]


@pytest.mark.parametrize("share", [None, "head.*", "backbone.*"])
def test_parameter_groups_keep_rates_of_their_own(url: str, share: Any) -> None:
    own = {} if share is None else {"share": share}
    made, _ = beside_plain(url, lambda: Optimized(two_groups), own=own)
    rates = [group["lr"] for group in made.optimizers[0].param_groups]
    assert rates == pytest.approx([0.001 / 8, 0.05])
