"""What people see of a round: metrics in their loggers and on the progress bar, and words above it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger(__name__)

_ON_PROGRESS_BAR = ("ppdl/round", "ppdl/uploaded_bytes", "ppdl/staleness", "ppdl/alone", "ppdl/epsilon")


def show(trainer: pl.Trainer, metrics: Mapping[str, float], on_step: bool | None, to_loggers: bool) -> None:
    """Log a round's metrics.

    Args:
        trainer: Whose loggers, and whose progress bar.
        metrics: By name; there may be none.
        on_step: Whether the bar shows them as a step's or as an epoch's; None where neither can be shown now.
        to_loggers: Whether this process writes to the loggers.
    """
    if not metrics:
        return
    # Lightning drops on-step metrics of steps that log_every_n_steps passes over, and a round may
    # well end on such a step; so the loggers are written to directly.
    for logger in trainer.loggers if to_loggers else ():
        logger.log_metrics(dict(metrics), step=trainer.global_step)
    # A self.log costs more than a training step of a small model; it is for eyes on the bar.
    if on_step is not None and trainer.progress_bar_callback is not None:
        for key in _ON_PROGRESS_BAR:
            if key in metrics:
                trainer.lightning_module.log(
                    key, metrics[key], prog_bar=True, logger=False, on_step=on_step, on_epoch=not on_step
                )


def tell(trainer: pl.Trainer, line: str) -> None:
    """A line for the user, above the progress bar where there is one."""
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(line)
    else:
        log.warning("%s", line)
