"""Private steps inside a Trainer: what the optimizer really gets, what is counted, what is refused."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from scipy import stats
from strategy_harness import Tiny, add_server, loader, trainer, url
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_ppdl import DSSGDStrategy, LargestValues, ServerOptimizer
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.record.checks import EXAMPLES
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.pytorch_lightning import PrivateTraining

__all__ = ["url"]

CLASSES, RECORDS = 8, 240


_ledgers: dict[Path, Ledger] = {}


def in_memory(path: Path) -> Ledger:
    """A ledger that seeded noise may use, one for each ``path``, which is not written."""
    return _ledgers.setdefault(path, Ledger(None))


def data(records: int = RECORDS, batch_size: int = 24, seed: int = 0, **settings: Any) -> DataLoader[Any]:
    """Eight classes around eight directions; easily learned."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(records) % CLASSES
    inputs = torch.eye(CLASSES)[labels] + 0.2 * torch.randn(records, CLASSES, generator=stream)
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, **settings)


class Recording(pl.LightningModule):
    """Keeps the batches it was trained on and the gradients that the optimizer saw."""

    def __init__(
        self,
        optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, 0.5),
        network: Callable[[], nn.Module] = lambda: nn.Linear(CLASSES, CLASSES),
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.network = network()
        self.make_optimizer, self.reduction = optimizer, reduction
        self.trained: list[Tensor] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(batch[0])
        return F.cross_entropy(self.network(batch[0]), batch[1], reduction=self.reduction)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(len(batch[0]))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def private(
    url: str, path: Path, noise: int = 0, strategy: dict[str, Any] | None = None, **mechanism: Any
) -> DSSGDStrategy:
    if strategy is None or "quantity" not in strategy:
        add_server(url)
    if "epsilon" not in mechanism:
        mechanism.setdefault("noise_multiplier", 1.0)
    return DSSGDStrategy(
        url,
        "anna",
        privacy=RecordLevel(**{"delta": 1e-5, **mechanism}),
        ledger=in_memory(path / "ledger"),
        noise=SeededNoise(noise, simulated=True),
        **{"selection": LargestValues(1.0), **(strategy or {})},
    )


def fit(
    module: pl.LightningModule, strategy: Any, loader: Any = None, validation: Any = None, **settings: Any
) -> pl.Trainer:
    made = trainer(strategy, **settings)
    made.fit(module, data() if loader is None else loader, validation)
    return made


def spent(path: Path) -> list[int]:
    """Steps of every event in the ledger."""
    with nullcontext(in_memory(path / "ledger")) as ledger:
        return [event.steps for event in ledger.events() if isinstance(event, PrivateSteps)]


def accuracy(module: Recording) -> float:
    inputs, labels = batch_of_all(seed=1)
    return float((module.network(inputs).argmax(1) == labels).float().mean())


def batch_of_all(seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs, labels = data(seed=seed).dataset[:]
    return inputs, labels


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


# Noise really arrives --------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1.0),
    "momentum": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_huge_noise_destroys_accuracy_and_little_noise_does_not(
    optimizer: str, url: str, tmp_path: Path
) -> None:
    little, huge = Recording(OPTIMIZERS[optimizer]), Recording(OPTIMIZERS[optimizer])
    fit(little, private(url, tmp_path, noise_multiplier=0.1), epochs=6)
    assert accuracy(little) > 0.9
    fit(huge, private(f"{url}b", tmp_path, noise_multiplier=300.0), epochs=6)
    assert accuracy(huge) < 0.5


class Watching(torch.optim.SGD):
    """SGD with rate 0 that keeps the gradients it was given."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"]]))
        return loss


def residues(
    module: Recording, made: pl.Trainer, sigma: float, clip: float, parts: int = 1
) -> np.ndarray[Any, Any]:
    """The gradients that the optimizer saw, less clipped sums taken one by one, over sigma C."""
    batches = module.trained[-len(made.optimizers[0].seen) * parts :]  # type: ignore[attr-defined]
    labels = {tuple(x.tolist()): int(y) for x, y in zip(*batch_of_all(), strict=True)}
    left = []
    for step, seen in enumerate(made.optimizers[0].seen):  # type: ignore[attr-defined]
        total = torch.zeros_like(seen)
        for inputs in batches[step * parts : (step + 1) * parts]:
            for x in inputs:
                loss = F.cross_entropy(module.network(x[None]), torch.tensor([labels[tuple(x.tolist())]]))
                taken = torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, list(module.network.parameters()))]
                )
                total += taken * min(1.0, clip / float(taken.norm()))
        left.append((seen * 24 - total) / (sigma * clip))
    return torch.cat(left).numpy()


def scale_p_value(values: np.ndarray[Any, Any]) -> float:
    """Two-sided, that these are normal with deviation 1 rather than another."""
    below = float(stats.chi2.cdf(np.square(values, dtype=np.float64).sum(), len(values)))
    return 2 * min(below, 1 - below)


@pytest.mark.parametrize(("reduction", "parts"), [("mean", 1), ("sum", 1), ("mean", 3)])
def test_the_optimizer_gets_the_clipped_sum_with_noise_of_the_right_scale(
    reduction: str, parts: int, url: str, tmp_path: Path
) -> None:
    sigma, clip = 0.7, 0.5
    module = Recording(Watching, reduction=reduction)
    strategy = private(url, tmp_path, noise_multiplier=sigma, clip=clip)
    made = fit(module, strategy, epochs=8, accumulate_grad_batches=parts)
    assert len(made.optimizers[0].seen) == 80  # type: ignore[attr-defined]
    left = residues(module, made, sigma, clip, parts)
    assert stats.kstest(left, "norm").pvalue > 1e-3
    assert scale_p_value(left) > 1e-3
    assert scale_p_value(left * 1.05) < 1e-5
    assert scale_p_value(left * 0.95) < 1e-5


def test_the_realised_size_of_a_sample_does_not_show(url: str, tmp_path: Path) -> None:
    module = Recording(Watching)
    strategy = private(url, tmp_path, noise_multiplier=1e-6, clip=1e-3)
    made = fit(module, strategy, epochs=1)
    sizes = [len(batch) for batch in module.trained[-10:]]
    assert len(set(sizes)) > 3
    # All are clipped, so the gradient grows with the size; a mean would not.
    left = residues(module, made, 1e-6, 1e-3)
    assert np.abs(left).max() < 1e3  # of a noise a millionth of the clip: float rounding


def test_gradient_clipping_of_the_trainer_acts_after_the_noise(url: str, tmp_path: Path) -> None:
    module = Recording(Watching)
    made = fit(module, private(url, tmp_path, noise_multiplier=50.0), epochs=1, gradient_clip_val=0.25)
    for seen in made.optimizers[0].seen:  # type: ignore[attr-defined]
        assert float(seen.norm()) == pytest.approx(0.25, rel=1e-3)


def test_gradients_that_are_shared_are_the_noised_ones(url: str, tmp_path: Path) -> None:
    module = Recording(Watching)
    add_server(url, merge=ServerOptimizer(partial(torch.optim.SGD, lr=0.1)))
    strategy = private(url, tmp_path, noise_multiplier=50.0, strategy={"quantity": "gradient"})
    made = fit(module, strategy, epochs=1)
    callback = strategy._callback
    total = torch.stack(made.optimizers[0].seen).sum(0)  # type: ignore[attr-defined]
    assert callback.reports[0].update_norm == pytest.approx(float(total.norm()), rel=1e-4)


def test_an_empty_sample_makes_a_step_of_noise_alone(url: str, tmp_path: Path) -> None:
    module = Recording(Watching)
    strategy = private(url, tmp_path, sampling_rate=0.005)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*None.*")
        made = fit(module, strategy, data(60), epochs=1)
    checked = EXAMPLES + 3  # training steps of the checks before training
    assert len(made.optimizers[0].seen) == 200  # type: ignore[attr-defined]
    assert len(module.trained) - checked < 100
    assert spent(tmp_path) == [200]
    assert all(torch.count_nonzero(seen) > 70 for seen in made.optimizers[0].seen)  # type: ignore[attr-defined]


def test_validation_loaders_are_left_alone(url: str, tmp_path: Path) -> None:
    module = Recording()
    fit(module, private(url, tmp_path), validation=data(50, 20), epochs=1, num_sanity_val_steps=1)
    assert module.validated == [20, 20, 20, 10]


# What is counted -------------------------------------------------------------------------------------


def test_the_ledger_has_all_steps_of_a_round_and_the_rest_at_the_end(url: str, tmp_path: Path) -> None:
    strategy = private(url, tmp_path, strategy={"round_length": 4})
    fit(Recording(), strategy, epochs=1)
    assert spent(tmp_path) == [4, 4, 2]


def test_steps_before_an_error_are_in_the_ledger(url: str, tmp_path: Path) -> None:
    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        fit(Recording(), private(url, tmp_path), epochs=1, callbacks=[Failing()])
    assert spent(tmp_path) == [7]


def test_steps_within_a_checkpoint_are_paid_for_by_who_resumes_it(url: str, tmp_path: Path) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    strategy = private(url, tmp_path)
    fit(Recording(), strategy, epochs=1, callbacks=[Saving()])
    assert spent(tmp_path) == [10]
    other = DSSGDStrategy(
        url,
        "berta",
        privacy=RecordLevel(noise_multiplier=1.0, delta=1e-5),
        ledger=in_memory(tmp_path / "other"),
        noise=SeededNoise(5, simulated=True),
    )
    made = trainer(other, epochs=1, max_steps=5)
    made.fit(Recording(), data(), ckpt_path=tmp_path / "three.ckpt")
    with nullcontext(in_memory(tmp_path / "other")) as ledger:
        events = [event for event in ledger.events() if isinstance(event, PrivateSteps)]
    assert sum(event.steps for event in events) >= 5


def test_calibrated_noise_spends_the_target_over_the_planned_steps(url: str, tmp_path: Path) -> None:
    strategy = private(url, tmp_path, epsilon=3.0)
    fit(Recording(), strategy, epochs=4)
    with nullcontext(in_memory(tmp_path / "ledger")) as ledger:
        events = list(ledger.events())
    from lightning_ppdl.privacy.accounting import total

    assert 2.9 < total(events, 1e-5).epsilon <= 3.0
    assert strategy._callback.reports[-1].merged


def test_without_budget_training_may_go_on_without_noise(url: str, tmp_path: Path) -> None:
    module = Recording(Watching)
    strategy = private(url, tmp_path, noise_multiplier=20.0, max_epsilon=0.1, on_exhausted="local")
    made = fit(module, strategy, epochs=6)
    seen = made.optimizers[0].seen  # type: ignore[attr-defined]
    assert len(seen) == 60
    steps = sum(spent(tmp_path))
    assert 0 < steps < 60
    assert min(float(s.norm()) for s in seen[:steps]) > 3
    assert max(float(s.norm()) for s in seen[steps:]) < 1.5


# What is refused -------------------------------------------------------------------------------------


class Stepping(Recording):
    """A training step of one's own."""

    def __init__(
        self, loss: Callable[[Any, Any], Any], network: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__(network=network or (lambda: nn.Linear(CLASSES, CLASSES)))
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self, batch)


def weighted(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.network(batch[0]), batch[1], weight=torch.arange(1.0, CLASSES + 1))


def contrastive(module: Any, batch: Any) -> Tensor:
    z = F.normalize(module.network(batch[0]), dim=1)
    return F.cross_entropy(z @ z.t() / 0.1, torch.arange(len(z)))


def mixup(module: Any, batch: Any) -> Tensor:
    mixed = 0.7 * batch[0] + 0.3 * batch[0].roll(1, 0)
    return F.cross_entropy(module.network(mixed), batch[1])


def square_root(module: Any, batch: Any) -> Tensor:
    total = F.cross_entropy(module.network(batch[0]), batch[1], reduction="sum")
    return total / math.sqrt(len(batch[0]))


def penalised(module: Any, batch: Any) -> Tensor:
    penalty = torch.cat([p.flatten() for p in module.parameters()]).square().sum()
    return F.cross_entropy(module.network(batch[0]), batch[1]) + 0.1 * penalty


def functional(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(batch[0] @ module.network.weight.t(), batch[1])


def vector(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.network(batch[0]), batch[1], reduction="none")


def nothing(module: Any, batch: Any) -> None:
    return None


class Remembering(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, CLASSES)
        self.register_buffer("mean", torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(x.mean(0))
        return self.layer(x)  # type: ignore[no-any-return]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(CLASSES, CLASSES), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)  # type: ignore[no-any-return]


class Manual(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fetching(Recording):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class Foreign(Recording):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.ones(2))], 0.1)


class Two(Recording):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


class Plateau(Recording):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}


class Twice(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def network(*layers: nn.Module) -> Recording:
    return Recording(network=lambda: nn.Sequential(*layers))


MODULES: dict[str, tuple[Callable[[], pl.LightningModule], str]] = {
    "batch norm": (lambda: network(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)), "GroupNorm"),
    "batch norm's parameters": (lambda: network(nn.Linear(8, 8), nn.BatchNorm1d(8)), "GroupNorm"),
    "instance norm": (
        lambda: network(
            nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Linear(4, 4)
        ),
        "running statistics",
    ),
    "a buffer": (lambda: Recording(network=Remembering), "changes 'network.mean'"),
    "a raw parameter": (lambda: Recording(network=Scaled), r"Scaled: scale\)"),
    "an LSTM": (lambda: network(nn.LSTM(8, 8)), "DPLSTM"),
    "class weights": (lambda: Stepping(weighted), "couples examples"),
    "a contrastive loss": (lambda: Stepping(contrastive), "couples examples"),
    "mixup": (lambda: Stepping(mixup), "couples examples"),
    "a strange scale": (lambda: Stepping(square_root), "neither the mean"),
    "a penalty": (lambda: Stepping(penalised), "weight_decay"),
    "functional use": (lambda: Stepping(functional), "call the layer"),
    "no scalar": (lambda: Stepping(vector), "scalar loss"),
    "no loss": (lambda: Stepping(nothing), "scalar loss"),
    "an iterator of batches": (Fetching, "dataloader_iter"),
    "manual optimization": (Manual, "automatic_optimization"),
    "a parameter from elsewhere": (Foreign, "none of the module's"),
    "two optimizers": (Two, "[mM]ultiple optimizers|2 optimizers"),
    "LBFGS": (lambda: Recording(torch.optim.LBFGS), "LBFGS"),
    "a plateau": (Plateau, "public_validation=True"),
    "a closure evaluated twice": (lambda: Recording(Twice), "more than once"),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_would_void_the_guarantee_are_refused(case: str, url: str, tmp_path: Path) -> None:
    make, reason = MODULES[case]
    strategy = private(url, tmp_path)
    with pytest.raises(Exception, match=reason) as refusal:
        fit(make(), strategy, epochs=1)
    assert isinstance(refusal.value, ConfigurationError) or case == "two optimizers"
    # Nothing has left, and nothing was spent.
    assert strategy._callback.reports == []


class Watched(Recording):
    """Writes to a buffer at one place, in the third step: the tests before training see nothing of it."""

    mean: Tensor

    def __init__(self, place: str, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.place, self.write = place, write
        self.register_buffer("mean", torch.zeros(CLASSES))

    def at(self, place: str, batch: Any) -> None:
        if place == self.place and self.trainer.fit_loop.epoch_loop.batch_idx == 2:
            self.write(self, batch[0].mean(0))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.at("start", batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at("step", batch)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.at("end", batch)


WRITES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "in place": (lambda module, mean: module.mean.copy_(mean), "mean"),
    "replaced": (lambda module, mean: setattr(module, "mean", mean), "mean"),
    "new": (lambda module, mean: module.network.register_buffer("seen", mean), "network.seen"),
}


@pytest.mark.parametrize("place", ["start", "step", "end"])
@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_that_data_reach_later_stops_training(
    place: str, write: str, url: str, tmp_path: Path
) -> None:
    change, name = WRITES[write]
    with pytest.raises(ConfigurationError, match=f"changed the buffer '{name}'"):
        fit(Watched(place, change), private(url, tmp_path), epochs=1)
    # No step was made with it; those before are paid for.
    assert spent(tmp_path) == [3 if place == "end" else 2]


def test_a_buffer_written_behind_the_back_of_autograd_stops_the_round(url: str, tmp_path: Path) -> None:
    module, strategy = Watched("step", lambda m, mean: m.mean.data.copy_(mean)), private(url, tmp_path)
    with pytest.raises(ConfigurationError, match="changed the buffer 'mean'"):
        fit(module, strategy, epochs=1)
    assert strategy._callback.reports == []


class Counting(Metric):
    """A metric that keeps what it counts in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def update(self, value: Tensor) -> None:
        self.seen += 1

    def compute(self) -> Tensor:
        return self.seen


class Harmless(Watched):
    """Sets a buffer before training, writes the same values again, and measures."""

    def __init__(self) -> None:
        super().__init__("step", lambda module, mean: module.rewrite())
        self.accuracy, self.counting = MulticlassAccuracy(CLASSES), Counting()

    def rewrite(self) -> None:
        self.mean.copy_(torch.ones(CLASSES))
        self.mean = self.mean.clone()

    def on_train_start(self) -> None:
        self.mean.fill_(1.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counting.update(batch[0])
        self.log("accuracy", self.accuracy(self.network(batch[0]), batch[1]))


def test_buffers_set_before_training_and_those_of_metrics_are_left_alone(url: str, tmp_path: Path) -> None:
    module = Harmless()
    fit(module, private(url, tmp_path), validation=data(16, 8), epochs=2, val_check_interval=5)
    assert spent(tmp_path) == [10, 10]
    assert module.counting.seen > 0


TRAINERS: dict[str, tuple[dict[str, Any], str]] = {
    "overfit": ({"overfit_batches": 2}, "overfit_batches=2"),
    "reload": ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders"),
    "scheduled accumulation": ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, "Scheduler"),
    "tuning": ({"callbacks": [LearningRateFinder()]}, "without noise"),
    "early stopping": ({"callbacks": [EarlyStopping("loss")]}, "public_validation=True"),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_trainers_that_would_void_the_guarantee_are_refused(case: str, url: str, tmp_path: Path) -> None:
    settings, reason = TRAINERS[case]
    with pytest.raises(ConfigurationError, match=reason):
        fit(Recording(), private(url, tmp_path), epochs=1, **settings)


LOADERS: dict[str, Any] = {
    "weighted": lambda: data(sampler=WeightedRandomSampler([1.0] * RECORDS, RECORDS)),
    "several": lambda: {"a": data(), "b": data()},
    "too few": lambda: data(2, 1),
}


@pytest.mark.parametrize("case", LOADERS)
def test_loaders_that_would_void_the_guarantee_are_refused(case: str, url: str, tmp_path: Path) -> None:
    reason = {"weighted": "Weighted", "several": "ConcatDataset", "too few": "2 records"}[case]
    with pytest.raises(ConfigurationError, match=reason):
        fit(Recording(), private(url, tmp_path), LOADERS[case](), epochs=1)


def test_loss_scaling_is_refused(url: str, tmp_path: Path) -> None:
    class Scaling(pl.plugins.precision.MixedPrecision):
        def __init__(self) -> None:
            self.precision, self.scaler = "16-mixed", torch.amp.GradScaler("cpu")

    with pytest.raises(ConfigurationError, match="scales the loss"):
        fit(Recording(), private(url, tmp_path), epochs=1, plugins=[Scaling()])


class Validated(Recording):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.network(batch[0]), batch[1]))


def test_going_back_to_the_best_checkpoint_is_refused(url: str, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss")
    settings: dict[str, Any] = {"callbacks": [best], "enable_checkpointing": True}
    fit(Validated(), private(url, tmp_path), validation=data(16, 8), epochs=1, **settings)
    made = trainer(private(f"{url}b", tmp_path), 2, **settings)
    with pytest.raises(ConfigurationError, match="the best by 'loss'"):
        made.fit(Validated(), data(), data(16, 8), ckpt_path=best.best_model_path)


def test_public_validation_data_may_steer(url: str, tmp_path: Path) -> None:
    strategy = private(url, tmp_path, public_validation=True)
    fit(Validated(), strategy, validation=data(16, 8), epochs=1, callbacks=[EarlyStopping("loss")])
    assert strategy._callback.reports[0].merged


# What is allowed, and left alone ---------------------------------------------------------------------


class Chatty(Recording):
    """Logs, counts, and keeps a metric, with dropout in the way."""

    def __init__(self) -> None:
        super().__init__(network=lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8)))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.steps = 0
        self.seen_at_start: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        logits = self.network(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy.update(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy})
        return {"loss": loss}


class AtStart(pl.Callback):
    """What there is when the first batch comes: everything before is the checks' doing."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.found:
            self.found = {
                "steps": pl_module.steps,
                "updates": pl_module.accuracy._update_count,
                "logged": dict(trainer.logged_metrics),
                "grads": [p.grad for p in pl_module.parameters()],
                "random": torch.rand(1).item(),
            }


def test_the_checks_leave_no_trace(url: str, tmp_path: Path) -> None:
    callback = AtStart()
    pl.seed_everything(1, verbose=False)
    module = Chatty()
    made = fit(module, private(url, tmp_path), epochs=1, callbacks=[callback])
    found = callback.found
    assert (found["steps"], found["updates"], found["logged"]) == (0, 0, {})
    assert found["grads"] == [None] * 4
    assert module.steps == 10
    assert "loss_step" in made.logged_metrics
    assert "log" not in module.__dict__
    # The same draws as without the checks.
    pl.seed_everything(1, verbose=False)
    plain, without = Chatty(), AtStart()
    fit(plain, "auto", epochs=1, callbacks=[without])
    assert found["random"] == without.found["random"]


def test_state_and_hooks_are_gone_after_training(url: str, tmp_path: Path) -> None:
    module = Recording()
    names = list(module.state_dict())
    fit(module, private(url, tmp_path), epochs=1)
    assert list(module.state_dict()) == names
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not module.network._forward_hooks


def test_layers_may_thaw_between_epochs(url: str, tmp_path: Path) -> None:
    class Thawing(BackboneFinetuning):
        def __init__(self) -> None:
            super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)

    class Grown(Recording):
        def __init__(self) -> None:
            super().__init__(network=lambda: nn.Linear(CLASSES, CLASSES))
            self.backbone = nn.Linear(CLASSES, CLASSES)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1.0)

    module = Grown()
    before = module.backbone.weight.detach().clone()
    strategy = private(url, tmp_path, strategy={"share": "network.*"})
    fit(module, strategy, epochs=2, callbacks=[Thawing()])
    assert not torch.equal(before, module.backbone.weight)
    assert spent(tmp_path) == [10, 10]

    class Sudden(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            pl_module.backbone.requires_grad_(batch_idx >= 3)

    sudden = Grown()
    sudden.backbone.requires_grad_(False)
    everything = torch.optim.SGD(sudden.parameters(), 1.0)
    sudden.configure_optimizers = lambda: everything  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="middle of an epoch"):
        fit(sudden, private(f"{url}b", tmp_path), epochs=1, callbacks=[Sudden()])


def test_a_second_fit_draws_other_samples_and_other_noise(url: str, tmp_path: Path) -> None:
    module = Recording(Watching)
    strategy = private(url, tmp_path)
    made = fit(module, strategy, epochs=1)
    first = list(made.optimizers[0].seen)  # type: ignore[attr-defined]
    made.fit_loop.max_epochs = 2
    made.fit(module, data())
    both = made.optimizers[0].seen  # type: ignore[attr-defined]
    assert len(both) == 20
    assert not any(torch.equal(a, b) for a in first for b in both[10:])
    assert sum(spent(tmp_path)) == 20


def test_the_mechanism_is_checked_when_it_is_made() -> None:
    good: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-5}
    RecordLevel(**good)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": None}, "exactly one of them.*null"),
        ({"epsilon": 1.0}, "exactly one of them.*null"),
        ({"delta": 0.0}, "delta"),
        ({"clip": 0.0}, "clip"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"steps": 0}, "steps"),
        ({"exact": True}, "exact"),
    ]
    for bad, name in cases:
        with pytest.raises(ConfigurationError, match=name):
            RecordLevel(**{**good, **bad})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "1.0", "nan", True, False, []])
@pytest.mark.parametrize(
    "name", ["noise_multiplier", "epsilon", "delta", "max_epsilon", "clip", "sampling_rate", "steps"]
)
def test_no_number_is_read_into_what_is_none(name: str, value: Any) -> None:
    given: dict[str, Any] = {} if name == "epsilon" else {"noise_multiplier": 1.0}
    with pytest.raises(ConfigurationError, match=re.escape(f"{name}={value!r}")):
        RecordLevel(**{**given, "delta": 1e-5, name: value})


@pytest.mark.parametrize("value", ["false", "False", 0, 1, None])
@pytest.mark.parametrize("name", ["public_validation", "exact"])
def test_a_switch_is_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{name}={value!r} must be True or False")):
        RecordLevel(**{"noise_multiplier": 1.0, "delta": 1e-5, name: value})


def test_a_delta_too_large_for_the_data_is_warned_of(url: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"not below 1 / n"):
        fit(Recording(), private(url, tmp_path, delta=0.01), epochs=1)


def test_it_stands_before_those_that_send(url: str, tmp_path: Path) -> None:
    strategy = private(url, tmp_path)
    made = fit(Tiny(), strategy, loader(), epochs=1)
    kinds = [type(callback) for callback in made.callbacks]  # type: ignore[attr-defined]
    assert kinds[0] is PrivateTraining
