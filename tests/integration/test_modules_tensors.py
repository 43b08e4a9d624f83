"""Parameters of every kind: tied, lazy, sparse, computed, complex, whole numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategy_harness import (
    Optimized,
    Tiny,
    Words,
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

from lightning_ppdl.backends.memory import find
from lightning_ppdl.errors import ConfigurationError

__all__ = ["one_thread", "url"]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.02)


class Tied(Optimized):
    """Decodes with the weight that it encodes with."""

    def __init__(self) -> None:
        super().__init__(adam)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.decoder = nn.Linear(4, 5)
        self.encoder = nn.Linear(5, 4, bias=False)
        self.encoder.weight = nn.Parameter(self.decoder.weight.detach().t().contiguous())
        self.again = nn.Linear(5, 4, bias=False)
        self.again.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        twice = self.again(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))
        return self.head(self.backbone(x) + twice)  # type: ignore[no-any-return]


@pytest.mark.parametrize("round_length", ["epoch", 2])
def test_tied_weights_are_counted_once_and_stay_tied(url: str, round_length: Any) -> None:
    made, module = beside_plain(url, Tied, own={"round_length": round_length})
    assert module.again.weight is module.encoder.weight
    assert {report.released_values for report in rounds(made)} == {34 + (4 * 5 + 5) + 5 * 4}
    assert find(url).status().parameters == 79


class Lazy(Optimized):
    """Finds out how many features there are when it sees some."""

    def __init__(self) -> None:
        super().__init__(adam)
        self.backbone = nn.LazyLinear(4)
        self.norm = nn.LazyBatchNorm1d()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.backbone(x))))  # type: ignore[no-any-return]

    def materialise(self) -> None:
        if isinstance(self.backbone.weight, nn.UninitializedParameter):
            with torch.no_grad():
                self(torch.zeros(2, 5))


class LazyByModel(Lazy):
    def configure_model(self) -> None:
        self.materialise()


class LazyBySetup(Lazy):
    def setup(self, stage: str) -> None:
        self.materialise()


class LazyByValidation(Lazy):
    """Relies on the validation that Lightning runs before training, to see whether it works."""


@pytest.mark.parametrize("make", [LazyByModel, LazyBySetup, LazyByValidation])
def test_lazy_layers_that_are_materialised_in_time(url: str, make: Any) -> None:
    server, module, expected = add_server(url), make(), make()
    for one, strategy in ((module, everything(url)), (expected, "auto")):
        torch.manual_seed(4)
        trainer(strategy).fit(one, loader(), loader(2) if make is LazyByValidation else None)
    require_alike(module.state_dict(), expected.state_dict())
    require_alike(torch.from_numpy(server.parameters()), flat(module))
    eager = Tiny()
    eager.norm = nn.BatchNorm1d(4)
    fit(eager, everything(url, "ben"), epochs=1)  # the same layout, made without lazy layers
    assert server.status().members[1].rounds == 1


def test_lazy_layers_that_are_not(url: str) -> None:
    server = add_server(url)
    with pytest.raises(ConfigurationError, match=r"'backbone\.weight' is not materialised.*configure_model"):
        fit(Lazy(), everything(url))
    assert server.status().members == () and server.status().parameters == 0


def sparse_adam(module: Words) -> torch.optim.Optimizer:
    module.backbone.requires_grad_(False)
    module.head.requires_grad_(False)
    return torch.optim.SparseAdam(list(module.embedding.parameters()), 0.05)


@pytest.mark.parametrize("configure", [sparse_adam, lambda m: torch.optim.Adagrad(m.parameters(), 0.05)])
@pytest.mark.parametrize("download_fraction", [1.0, 0.1])
def test_of_a_sparse_embedding_only_the_words_that_occur_leave(
    url: str, configure: Any, download_fraction: float
) -> None:
    own = {"download_fraction": download_fraction}
    made, module = beside_plain(url, lambda: Words(configure), own=own)
    dense = 34 if module.head.weight.requires_grad else 0
    assert {report.released_values for report in rounds(made)} == {dense + 2 * 5}


class Reparametrised(Optimized):
    """Weights that are computed from what is trained: a direction and a length, an orthogonal matrix."""

    def __init__(self) -> None:
        super().__init__(adam)
        nn.utils.parametrizations.weight_norm(self.backbone)
        nn.utils.parametrizations.orthogonal(self.head)


def test_of_weights_that_are_computed_what_they_are_computed_from_is_shared(url: str) -> None:
    made, module = beside_plain(url, Reparametrised)
    assert {report.released_values for report in rounds(made)} <= {34 + 4, 34 + 4 - 3}
    weight = module.head.weight.detach()
    require_alike(weight @ weight.T, torch.eye(2), 1e-5)


class Convolutional(Optimized):
    """A convolution whose weight may lie in memory with its channels last, and a scalar."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__(adam)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.convolution = nn.Conv2d(2, 3, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.to(memory_format=memory_format)

    def forward(self, x: Tensor) -> Tensor:
        image = torch.stack([x, x * x], 1).reshape(-1, 2, 1, 5).expand(-1, -1, 3, -1)
        return super().forward(x + self.scale * self.convolution(image).mean((1, 2, 3)).unsqueeze(1))


def test_how_a_weight_lies_in_memory_is_nobodys_business(url: str) -> None:
    _, module = beside_plain(url, lambda: Convolutional(torch.channels_last))
    weight = module.convolution.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    still = Convolutional(torch.contiguous_format)
    still.configure = lambda m: torch.optim.SGD(m.parameters(), 0.0)
    fit(still, everything(url, "ben"), epochs=1)
    require_alike(still.state_dict(), module.state_dict())
    assert still.convolution.weight.is_contiguous()
    assert module.scale != 0.5


class Phased(Optimized):
    """A complex parameter that is trained, and whole numbers that are not."""

    def __init__(self) -> None:
        super().__init__(adam)
        self.phase = nn.Parameter(torch.ones(5, dtype=torch.complex64))
        self.order = nn.Parameter(torch.arange(5).flip(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x[:, self.order] * self.phase).real)


def test_complex_parameters_are_refused_or_local(url: str) -> None:
    server = add_server(url)
    with pytest.raises(ConfigurationError, match=r"'phase' has dtype torch\.complex64.*share="):
        fit(Phased(), everything(url))
    assert server.status().members == ()
    _, module = beside_plain(f"{url}-real", Phased, own={"share": ["head.*", "backbone.*"]})
    assert (module.phase.detach() - 1).abs().max() > 0.01
    assert module.order.tolist() == [4, 3, 2, 1, 0]
    assert find(f"{url}-real").status().parameters == 34
