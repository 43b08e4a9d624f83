"""The Lightning side of record-level privacy: :class:`PrivateTraining`."""

from lightning_ppdl.plugin.private_training.callback import PrivateTraining

__all__ = ["PrivateTraining"]
