"""Modules of which a part is trained or shared: frozen backbones, adapters, layers thawed on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from strategy_harness import (
    Optimized,
    Tiny,
    add_server,
    beside_plain,
    everything,
    fit,
    flat,
    loader,
    one_thread,
    require_alike,
    rounds,
    trainer,
    url,
)
from torch import Tensor, nn

from lightning_ppdl import DSSGDStrategy, LargestValues
from lightning_ppdl.backends.memory import find

__all__ = ["one_thread", "url"]


def decayed(module: nn.Module) -> torch.optim.Optimizer:
    """Of all parameters, as most modules write it: the frozen ones among them, and weight decay."""
    return torch.optim.AdamW(module.parameters(), 0.02, weight_decay=0.1)


class Pretrained(Optimized):
    """A frozen backbone with its normalisation in evaluation mode, and a head to train."""

    def __init__(self) -> None:
        super().__init__(decayed)
        self.norm = nn.BatchNorm1d(5)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        self.backbone.requires_grad_(False)
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm.eval()(x))


@pytest.mark.parametrize("initial", ["own", 7])
def test_a_frozen_backbone_stays_to_the_bit(url: str, initial: Any) -> None:
    """Also where the shared part starts from a public seed, for which every layer's reset is called."""
    torch.manual_seed(1)
    server, module = add_server(url), Pretrained()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, DSSGDStrategy(url, "anna", selection=LargestValues(1.0), initial=initial))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    require_alike(torch.from_numpy(server.parameters()), flat(module.head))


def test_a_frozen_backbone_is_plain_training(url: str) -> None:
    beside_plain(url, Pretrained)


class LoRALinear(nn.Linear):
    """A frozen layer and a trainable update of rank 2 (E. Hu et al., "LoRA", ICLR 2022, section 4.1)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, inputs))
        self.lora_b = nn.Parameter(torch.empty(outputs, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "lora_a"):
            nn.init.kaiming_uniform_(self.lora_a)
            nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Adapted(Optimized):
    """Adapters in the backbone, and a trainable head that stays at home."""

    def __init__(self, seed: int = 11) -> None:
        super().__init__(decayed)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.backbone = LoRALinear(5, 4)
            torch.manual_seed(seed)
            self.head.reset_parameters()

    @property
    def adapters(self) -> Tensor:
        layer: Any = self.backbone
        return torch.cat([layer.lora_a.detach().reshape(-1), layer.lora_b.detach().reshape(-1)])


@pytest.mark.parametrize("share", ["*.lora_*", lambda name, parameter: "lora" in name])
def test_alone_adapters_and_a_local_head_are_plain_training(url: str, share: Any) -> None:
    _, module = beside_plain(url, Adapted, own={"share": share})
    assert torch.equal(module.backbone.weight, Adapted().backbone.weight)


def test_only_adapters_travel(url: str) -> None:
    """Of two clinics with heads of their own: the second adapts what the first has learned."""
    server, anna, ben, expected = add_server(url), Adapted(1), Adapted(2), Adapted(2)
    fit(anna, everything(url, share="*.lora_*"), epochs=2)
    learned = torch.from_numpy(server.parameters())
    require_alike(learned, anna.adapters)
    assert server.status().parameters == 2 * 5 + 4 * 2
    made = trainer(everything(url, "ben", share="*.lora_*"), epochs=2)
    made.fit(ben, loader(3))
    layer: Any = expected.backbone
    nn.utils.vector_to_parameters(learned.clone(), [layer.lora_a, layer.lora_b])
    trainer(epochs=2).fit(expected, loader(3))
    require_alike(ben.state_dict(), expected.state_dict())
    require_alike(torch.from_numpy(server.parameters()), expected.adapters)
    assert {report.released_values for report in rounds(made)} == {18}
    assert torch.equal(ben.backbone.weight, anna.backbone.weight)


def test_adapters_start_from_a_public_seed(url: str) -> None:
    """The reset that sets them resets the pretrained weight too: that is undone."""
    still = [Adapted(1), Adapted(2)]
    for module, name in zip(still, ("anna", "ben"), strict=True):
        module.configure = lambda m: torch.optim.SGD(m.parameters(), 0.0)
        fit(module, DSSGDStrategy(url, name, selection=LargestValues(1.0), share="*.lora_*", initial=7))
    assert torch.equal(still[0].adapters, still[1].adapters)
    assert not torch.equal(still[0].adapters, Adapted().adapters)
    assert torch.equal(still[0].backbone.weight, Adapted().backbone.weight)
    assert torch.equal(still[0].head.weight, Adapted(1).head.weight)


def thawing(module: Any) -> torch.optim.Optimizer:
    """Of what is trainable; the callback adds the backbone's group."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1, 0.9)


def test_layers_thawed_on_the_way_train_at_home(url: str) -> None:
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, verbose=False)
    made, module = beside_plain(
        url, lambda: Optimized(thawing), own={"share": "*"}, callbacks=[finetuning], epochs=4
    )
    assert len(made.optimizers[0].param_groups) == 2
    assert not torch.equal(module.backbone.weight, Tiny().backbone.weight)
    require_alike(torch.from_numpy(find(url).parameters()), flat(module.head))
