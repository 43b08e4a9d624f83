"""Compiled modules are the modules they were: the same training, and the same names for the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from strategy_harness import (
    Optimized,
    Tiny,
    add_server,
    everything,
    fit,
    flat,
    loader,
    one_thread,
    require_alike,
    trainer,
    url,
)
from torch import nn

from lightning_ppdl import DSSGDStrategy, LargestValues

__all__ = ["one_thread", "url"]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def adam(module: Tiny) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), 0.02)


def whole(backend: Any = "eager") -> Any:
    return torch.compile(Optimized(adam), backend=backend)


def in_place(backend: Any = "eager") -> Tiny:
    module = Optimized(adam)
    module.backbone.compile(backend=backend)
    return module


class Wrapping(Optimized):
    """Compiles a layer of its own, as many modules do in ``configure_model``; its name is longer then."""

    def configure_model(self) -> None:
        if isinstance(self.backbone, nn.Linear):
            self.backbone = torch.compile(self.backbone, backend="eager")  # type: ignore[assignment]


def wrapping() -> Tiny:
    return Wrapping(adam)


@pytest.mark.parametrize("make", [lambda: whole("aot_eager"), in_place, wrapping])
def test_compiled_training_is_plain_training(url: str, make: Any) -> None:
    server, module, expected = add_server(url), make(), Optimized(adam)
    trainer(everything(url, round_length=2)).fit(module, loader())
    fit(expected)
    require_alike(torch.from_numpy(server.parameters()), flat(expected))
    require_alike(flat(module), flat(expected))


def test_rounds_compile_nothing_anew(url: str) -> None:
    graphs: list[list[Any]] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs[-1].append(graph)
        return graph.forward

    for epochs in (1, 3):
        torch.compiler.reset()
        graphs.append([])
        strategy = everything(f"{url}-{epochs}", round_length=1)
        trainer(strategy, epochs=epochs).fit(whole(counting), loader())
    assert len(graphs[0]) == len(graphs[1]) > 0


@pytest.mark.parametrize("make", [whole, in_place, wrapping])
@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_and_uncompiled_participants_collaborate(url: str, make: Any, compiled_first: bool) -> None:
    """The second goes on from where the first ended, in one collaboration."""
    first, second = (make(), Optimized(adam)) if compiled_first else (Optimized(adam), make())
    server, expected = add_server(url), Optimized(adam)
    trainer(everything(url), epochs=1).fit(first, loader())
    trainer(everything(url, "ben"), epochs=1).fit(second, loader(3))
    for seed in (0, 3):
        trainer(epochs=1).fit(expected, loader(seed))
    assert [member.rounds for member in server.status().members] == [1, 1]
    require_alike(torch.from_numpy(server.parameters()), flat(expected))


@pytest.mark.parametrize("make", [whole, wrapping])
def test_a_public_seed_says_the_same_to_compiled_modules(url: str, make: Any) -> None:
    for name, module in (("compiled", make()), ("plain", Optimized(adam))):
        strategy = DSSGDStrategy(f"{url}-{name}", name, selection=LargestValues(1.0), initial=7)
        trainer(strategy, epochs=1).fit(module, loader())
        if name == "compiled":
            values = flat(module)
    require_alike(values, flat(module))


def test_patterns_name_what_was_there_before_compilation(url: str) -> None:
    server, module = add_server(url), wrapping()
    fit(module, everything(url, share="backbone.weight"))
    require_alike(torch.from_numpy(server.parameters()), module.backbone.weight.detach().reshape(-1))


def test_a_compiled_module_goes_on_in_a_second_fit(url: str) -> None:
    module, expected = whole(), Optimized(adam)
    made, plain = trainer(everything(url), epochs=1), trainer(epochs=2)
    made.fit(module, loader())
    made.fit_loop.max_epochs = 2
    made.fit(module, loader())
    plain.fit(expected, loader())
    require_alike(flat(module), flat(expected))
    require_alike(made.optimizers[0].state_dict(), plain.optimizers[0].state_dict())
