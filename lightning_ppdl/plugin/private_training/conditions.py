"""What of a Trainer and its optimizers does not go with private steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import LBFGS

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.plugin.packages import callbacks_of, package_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

_FOLLOWS = (
    "follows a metric of private data without noise, so what it decides is not covered; {remedy}, or declare "
    "the validation data public with public_validation=True"
)


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule, public_validation: bool) -> None:
    """Refuse settings of the Trainer under which steps would not be private.

    Raises:
        ConfigurationError: naming the setting, with the reason and the remedy.
    """
    if not module.automatic_optimization:
        raise ConfigurationError(
            "automatic_optimization=False: private steps have to stand between backward and the optimizer's "
            "step, which manual optimization calls by itself; use automatic optimization"
        )
    signatures = package_of(trainer).utilities.signature_utils
    if signatures.is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ConfigurationError(
            "training_step(dataloader_iter) fetches batches by itself, so nobody knows which records a step "
            "saw; take training_step(batch, batch_idx)"
        )
    if trainer.num_devices != 1 or trainer.num_nodes != 1:
        raise ConfigurationError(
            f"devices={trainer.num_devices}, num_nodes={trainer.num_nodes}: privacy of records trains on one "
            f"device; give Trainer(devices=1, num_nodes=1)"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigurationError(
            f"precision={trainer.precision!r} scales the loss by what gradients happen to be and skips "
            f"steps; use precision='bf16-mixed' or '32-true'"
        )
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
    reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if overfit:
        raise ConfigurationError(
            f"overfit_batches={overfit!r} draws the same records again and again; leave it at 0"
        )
    if reload:
        raise ConfigurationError(
            f"reload_dataloaders_every_n_epochs={reload!r}: the number of "
            f"records and their sampling rate must stay as accounted for; leave it at 0"
        )
    for callback in callbacks_of(trainer, "GradientAccumulationScheduler"):
        if callback.going_to_accumulate_grad_batches():
            raise ConfigurationError(
                "GradientAccumulationScheduler changes how many batches make a step, and each step is one "
                "sample of a constant rate; give Trainer(accumulate_grad_batches=...)"
            )
    for callback in callbacks_of(trainer, "LearningRateFinder", "BatchSizeFinder"):
        raise ConfigurationError(
            f"{type(callback).__name__} trains on private data without noise; find the setting on public data"
        )
    for callback in callbacks_of(trainer, "EarlyStopping"):
        if not public_validation:
            remedy = "give Trainer(max_epochs=...) alone"
            raise ConfigurationError(
                f"EarlyStopping(monitor={callback.monitor!r}) {_FOLLOWS.format(remedy=remedy)}"
            )


def check_start(trainer: pl.Trainer, trained: Mapping[str, nn.Parameter], public_validation: bool) -> None:
    """Refuse optimizers that private steps do not reach, and what follows private metrics without noise.

    That ``ckpt_path`` is the best by a private metric is known only while the ModelCheckpoint that chose it
    is among the Trainer's callbacks; in another Trainer it looks like any other file.

    Args:
        trained: What gets private gradients.

    Raises:
        ConfigurationError: naming it, with the reason and the remedy.
    """
    if len(trainer.optimizers) != 1:
        raise ConfigurationError(
            f"{len(trainer.optimizers)} optimizers: each step of each would need its own sample and its own "
            f"noise; use one, with parameter groups if their settings differ"
        )
    optimizer = trainer.optimizers[0]
    if isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates several gradients a step, and each would cost; use SGD, Adam or another one "
            "that evaluates one"
        )
    for callback in callbacks_of(trainer, "ModelCheckpoint"):
        if (
            callback.monitor is not None
            and callback.best_model_path
            and str(trainer.ckpt_path) == callback.best_model_path
            and not public_validation
        ):
            remedy = "resume from the last checkpoint"
            raise ConfigurationError(
                f"ckpt_path={trainer.ckpt_path!r}, the best by {callback.monitor!r}, "
                f"{_FOLLOWS.format(remedy=remedy)}"
            )
    known = set(trained.values())
    if any(p.requires_grad and p not in known for group in optimizer.param_groups for p in group["params"]):
        raise ConfigurationError(
            "the optimizer has trainable parameters that are none of the module's, so their gradients would "
            "get no noise; make them parameters of one of the module's layers"
        )
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and not public_validation:
            remedy = "take a schedule that counts steps or epochs"
            raise ConfigurationError(
                f"{type(config.scheduler).__name__}(monitor={config.monitor!r}) "
                f"{_FOLLOWS.format(remedy=remedy)}"
            )
