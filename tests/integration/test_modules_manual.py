"""Manual optimization: a generator and a discriminator, whose steps Lightning counts one by one."""

from __future__ import annotations

from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from strategy_harness import (
    BATCHES,
    Ends,
    add_server,
    beside_plain,
    everything,
    fit,
    flat,
    loader,
    one_thread,
    require_alike,
    rounds,
    steps_at_ends,
    trainer,
    url,
)
from torch import Tensor, nn

__all__ = ["one_thread", "url"]


class Adversarial(pl.LightningModule):
    """Two optimizers and a schedule for one of them; each batch both step, the discriminator first.

    Args:
        generate_every: Batches from one of the generator's steps to the next.
    """

    def __init__(self, generate_every: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
            self.discriminator = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        self.generate_every = generate_every
        self.automatic_optimization = False

    def judge(self, x: Tensor, real: bool) -> Tensor:
        verdict = self.discriminator(x)
        return nn.functional.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, real))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generating, judging = cast(Any, self.optimizers())
        x = batch[0]
        fake = self.generator(torch.randn(len(x), 3))
        self.toggle_optimizer(judging)
        judging.zero_grad()
        self.manual_backward(self.judge(x, True) + self.judge(fake.detach(), False))
        judging.step()
        self.untoggle_optimizer(judging)
        if batch_idx % self.generate_every == 0:
            self.toggle_optimizer(generating)
            generating.zero_grad()
            self.manual_backward(self.judge(fake, True))
            generating.step()
            self.untoggle_optimizer(generating)
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("verdict", self.judge(batch[0], True))

    def configure_optimizers(self) -> Any:
        generating = torch.optim.Adam(self.generator.parameters(), 0.02)
        judging = torch.optim.SGD(self.discriminator.parameters(), 0.2, 0.9)
        return [generating, judging], [torch.optim.lr_scheduler.StepLR(generating, 1, 0.5)]


@pytest.mark.parametrize(
    ("round_length", "generate_every", "ends"),
    [
        ("epoch", 1, [12, 24]),
        # A step of either optimizer is a step, and a round ends with the batch that makes them n.
        (1, 1, [2 * batch for batch in range(1, 2 * BATCHES + 1)]),
        (2, 1, [2 * batch for batch in range(1, 2 * BATCHES + 1)]),
        (3, 1, [4, 8, 12, 16, 20, 24]),
        (5, 1, [6, 12, 18, 24]),
        (100, 1, [24]),
        ("epoch", 3, [8, 16]),
        (3, 3, [3, 6, 10, 14, 16]),
    ],
)
def test_rounds_count_the_steps_of_both_optimizers(
    url: str, round_length: Any, generate_every: int, ends: list[int]
) -> None:
    made, _ = beside_plain(
        url,
        lambda: Adversarial(generate_every),
        own={"round_length": round_length},
        callbacks=[Ends(url)],
        epochs=2,
    )
    assert steps_at_ends(made) == ends
    assert [report.round for report in rounds(made)] == list(range(1, len(ends) + 1))


def test_a_shared_generator_and_discriminators_of_ones_own(url: str) -> None:
    server, anna, ben = add_server(url), Adversarial(), Adversarial()
    fit(anna, everything(url, share="generator.*"), epochs=1)
    after_anna = torch.from_numpy(server.parameters())
    require_alike(after_anna, flat(anna.generator))
    own = [value.clone() for value in anna.discriminator.parameters()]

    expected = Adversarial()
    nn.utils.vector_to_parameters(after_anna.clone(), expected.generator.parameters())
    for module, strategy in ((ben, everything(url, "ben", share="generator.*")), (expected, "auto")):
        torch.manual_seed(9)
        trainer(strategy, epochs=1).fit(module, loader(3))
    require_alike(ben.state_dict(), expected.state_dict())
    require_alike(torch.from_numpy(server.parameters()), flat(ben.generator))
    assert all(torch.equal(a, b) for a, b in zip(own, anna.discriminator.parameters(), strict=True))


class Accumulating(Adversarial):
    """Steps both optimizers, by hand, after every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generating, judging = cast(Any, self.optimizers())
        fake = self.generator(torch.randn(len(batch[0]), 3))
        self.manual_backward(self.judge(batch[0], True) + self.judge(fake, False))
        if batch_idx % 3 == 2:
            for optimizer in (generating, judging):
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(("round_length", "ends"), [(1, [2, 4, 6, 8]), (3, [4, 8]), ("epoch", [4, 8])])
def test_batches_without_a_step_end_no_round(url: str, round_length: Any, ends: list[int]) -> None:
    made, _ = beside_plain(
        url, Accumulating, own={"round_length": round_length}, callbacks=[Ends(url)], epochs=2
    )
    assert steps_at_ends(made) == ends
