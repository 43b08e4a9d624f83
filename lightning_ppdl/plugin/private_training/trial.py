"""Training steps of a LightningModule that leave no trace, for the checks before training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.plugin.packages import package_of
from lightning_ppdl.randomness import numpy_generator

if TYPE_CHECKING:
    import pytorch_lightning as pl

_PLAIN = (bool, int, float, complex, str, bytes, type(None), list, dict, set, tuple)


@contextmanager
def trial_loss(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Any], examples: int
) -> Iterator[tuple[int, Callable[[Sequence[int]], Tensor]]]:
    """Within it, losses of ``training_step`` on batches of one's choice.

    Logged values are dropped; metrics, and plain attributes of the modules, are put back at the end.

    Yields:
        How many examples there are to choose from, at most ``examples``, drawn from the data set; and a
        function from positions among them to the loss.
    """
    package = package_of(trainer)
    dataset: Any = loader.dataset
    count = min(examples, len(dataset))
    # At random: records often stand in some order, and every n-th may be of one kind.
    rows = numpy_generator(0, "trial", len(dataset)).permutation(len(dataset))[:count].tolist()
    fetched = None if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]

    def loss(positions: Sequence[int]) -> Tensor:
        if fetched is None:
            items = dataset.__getitems__([rows[position] for position in positions])
        else:
            items = [copy.deepcopy(fetched[position]) for position in positions]
        batch = trainer.precision_plugin.convert_input(loader.collate_fn(items))
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        arguments = [batch]
        if package.utilities.signature_utils.is_param_in_hook_signature(
            module.training_step, "batch_idx", min_args=2
        ):
            arguments.append(0)
        with trainer.precision_plugin.train_step_context():
            output: Any = module.training_step(*arguments)
        value = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(value, Tensor) or value.ndim:
            raise ConfigurationError(
                f"training_step returned {type(output).__name__}; privacy of records needs a scalar loss for "
                f"every batch"
            )
        return value

    loggers = trainer.loggers
    attributes = [(part, _plain(part)) for part in module.modules()]
    metrics = [(part, _state(part)) for part in module.modules() if isinstance(part, Metric)]
    talkers = [part for part in module.modules() if isinstance(part, package.LightningModule)]
    try:
        trainer.loggers = [package.loggers.logger.DummyLogger()]
        for talker in talkers:
            talker.__dict__["log"] = talker.__dict__["log_dict"] = _drop
        yield count, loss
    finally:
        for talker in talkers:
            del talker.__dict__["log"], talker.__dict__["log_dict"]
        trainer.loggers = loggers
        for part, kept in (*attributes, *metrics):
            part.__dict__.update(kept)


def _drop(*args: Any, **kwargs: Any) -> None:
    """In place of ``self.log``."""


def _plain(part: nn.Module) -> dict[str, Any]:
    """The attributes in which a step may count or collect something."""
    return {
        name: copy.copy(value)
        for name, value in part.__dict__.items()
        if not name.startswith("_") and name != "training" and isinstance(value, _PLAIN)
    }


def _state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache", "_cache", "_to_sync"]
    return {name: copy.deepcopy(metric.__dict__[name]) for name in names if name in metric.__dict__}
