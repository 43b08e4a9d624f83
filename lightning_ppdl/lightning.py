"""The strategies and callbacks for ``lightning.pytorch``, whose Trainer takes no others.

Everything else of this package serves both of Lightning's packages.
"""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_ppdl.plugin import private_training
from lightning_ppdl.plugin.rounds import Rounds
from lightning_ppdl.plugin.strategy import OneDevice, SeveralDevices

# To a type checker the mixins are pytorch_lightning's, whose classes are the same under another name.


class DSSGDCallback(Rounds, pl.Callback):  # type: ignore[misc]
    """:class:`lightning_ppdl.DSSGDCallback` for a ``lightning.pytorch.Trainer``."""


class PrivateTraining(private_training.PrivateTraining, pl.Callback):  # type: ignore[misc]
    """What makes the steps of a ``lightning.pytorch.Trainer`` private."""


class DSSGDStrategy(OneDevice, SingleDeviceStrategy):  # type: ignore[misc]
    """:class:`lightning_ppdl.DSSGDStrategy` for a ``lightning.pytorch.Trainer``."""

    strategy_name = "dssgd"
    callback_class = DSSGDCallback
    private_class = PrivateTraining


class DSSGDDDPStrategy(SeveralDevices, DDPStrategy):  # type: ignore[misc]
    """:class:`lightning_ppdl.DSSGDDDPStrategy` for a ``lightning.pytorch.Trainer``."""

    strategy_name = "dssgd_ddp"
    callback_class = DSSGDCallback
    private_class = PrivateTraining
