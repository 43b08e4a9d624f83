"""Tiny modules and Trainers, so that a whole ``fit()`` takes tens of milliseconds."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import Add, DSSGDStrategy, LargestValues, ParameterServer, close, connect, serve

BATCHES = 6
_numbers = itertools.count()


@pytest.fixture
def url() -> Iterator[str]:
    """An address that no other test has."""
    address = f"memory://integration-{next(_numbers)}"
    yield address
    close(address)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where it is imported: for matrices this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loader(seed: int = 0, shuffle: bool = False, batches: int = BATCHES) -> DataLoader[Any]:
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * batches, 5, generator=stream)
    y = x[:, :2] * 0.5 + 0.1 * torch.randn(4 * batches, 2, generator=stream)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)


class Tiny(pl.LightningModule):
    """A small regression with momentum and a schedule: state that rounds must not disturb."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.backbone = nn.Linear(5, 4)
            self.head = nn.Linear(4, 2)
        self.dropout = nn.Dropout(dropout)
        self.lr, self.momentum = lr, momentum

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.backbone(x))))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, self.lr, self.momentum)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Optimized(Tiny):
    """With the optimizers and schedulers that ``configure`` makes for it."""

    def __init__(self, configure: Callable[[Any], Any], **settings: Any) -> None:
        super().__init__(**settings)
        self.configure = configure

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Words(Optimized):
    """An embedding of 50 words, of which two occur, with sparse gradients."""

    def __init__(self, configure: Any) -> None:
        super().__init__(configure)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(50, 5, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.embedding((x[:, 0] > 0).long()))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()])


def add_server(url: str, **settings: Any) -> ParameterServer:
    return serve(url, ParameterServer(merge=settings.pop("merge", Add()), **settings))


def everything(url: str, participant: str = "anna", **settings: Any) -> DSSGDStrategy:
    """A strategy that shares all, starting from the module's own values: alone, it is plain training."""
    settings.setdefault("selection", LargestValues(1.0))
    settings.setdefault("initial", "own")
    return DSSGDStrategy(url, participant, **settings)


def trainer(strategy: Any = "auto", epochs: int | None = 3, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": epochs,
    }
    return pl.Trainer(strategy=strategy, **{**quiet, **settings})


def fit(module: pl.LightningModule, strategy: Any = "auto", **settings: Any) -> pl.Trainer:
    made = trainer(strategy, **settings)
    made.fit(module, loader())
    return made


def momenta(of: pl.Trainer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in of.optimizers[0].state.values()]


def rounds(of: pl.Trainer) -> list[Any]:
    """The reports of all rounds of a participant's Trainer."""
    from lightning_ppdl import DSSGDCallback

    (callback,) = [callback for callback in of.callbacks if isinstance(callback, DSSGDCallback)]  # type: ignore[attr-defined]
    return callback.reports


class Ends(pl.Callback):
    """The steps taken when each round ended; looks when all callbacks are through with a batch."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps += [trainer.global_step] * (connect(self.url).status().version - len(self.steps))

    def on_fit_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_batch_start(trainer)


def steps_at_ends(of: pl.Trainer) -> list[int]:
    """What :class:`Ends` saw."""
    (seen,) = [callback for callback in of.callbacks if isinstance(callback, Ends)]  # type: ignore[attr-defined]
    return seen.steps


def require_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-5)


def require_alike(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Of states: tensors and numbers in dictionaries and lists."""
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


def beside_plain(
    url: str,
    make: Callable[[], Any],
    own: dict[str, Any] | None = None,
    tolerance: float = 1e-6,
    **settings: Any,
) -> tuple[pl.Trainer, Any]:
    """Train ``make()`` plainly, and as the only participant, that shares everything: both must end alike.

    Alike are parameters, buffers, what the optimizers hold, and where the schedulers are. The server must
    have what is trainable, unless ``own``, further settings of the strategy, names something else.

    Returns:
        The participant's Trainer and module.
    """
    own = own or {}
    server = add_server(url)

    def run(strategy: Any) -> tuple[pl.Trainer, Any]:
        pl.seed_everything(5, verbose=False)
        module, made = make(), trainer(strategy, **copy.deepcopy(settings))
        made.fit(module, loader(), loader(2))
        return made, module

    plain, expected = run("auto")
    made, module = run(everything(url, **own))
    assert made.global_step == plain.global_step > 0
    assert len(rounds(made)) == server.version > 0
    pl.seed_everything(5, verbose=False)
    before = make().parameters()
    moved = [(p - q).detach().abs().max() for p, q in zip(expected.parameters(), before, strict=True)]
    assert max(moved) > 0.01, "training changes nothing that could be compared"
    require_alike(module.state_dict(), expected.state_dict(), tolerance)
    for ours, theirs in zip(made.optimizers, plain.optimizers, strict=True):
        require_alike(ours.state_dict(), theirs.state_dict(), tolerance)
    for one, other in zip(made.lr_scheduler_configs, plain.lr_scheduler_configs, strict=True):
        assert one.scheduler.last_epoch == other.scheduler.last_epoch
    if not {"share", "share_buffers"} & own.keys():
        trained = [p.detach().reshape(-1).float() for p in module.parameters() if p.requires_grad]
        require_alike(torch.from_numpy(server.parameters()), torch.cat(trained), tolerance)
    return made, module


def together(*participants: Callable[[], object]) -> None:
    """Run all at once, each in a thread, and raise what the first that failed raised."""
    failures: list[BaseException] = []

    def run(participant: Callable[[], object]) -> None:
        try:
            participant()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(participant,), daemon=True) for participant in participants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]
