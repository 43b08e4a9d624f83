"""Data sets: each source is a small frozen record whose ``load()`` returns :class:`Splits`."""

from lightning_ppdl.data.dataset import ArrayDataset, Batch, DataSource, Splits, loader
from lightning_ppdl.data.features import Features
from lightning_ppdl.data.mnist import MNIST
from lightning_ppdl.data.svhn import SVHN
from lightning_ppdl.data.tables import BreastCancer, Digits

__all__ = [
    "MNIST",
    "SVHN",
    "ArrayDataset",
    "Batch",
    "BreastCancer",
    "DataSource",
    "Digits",
    "Features",
    "Splits",
    "loader",
]
