"""One clinic of several, each in a process or on a machine of its own:

    ppdl serve protocol=round_robin members=[clinic-a,clinic-b]
    python examples/clinic.py clinic-a grpc://localhost:50051
    python examples/clinic.py clinic-b grpc://localhost:50051

Killed, and started again, it goes on from its checkpoint.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy

from lightning_ppdl import DSSGDStrategy, LargestValues

ROWS = {"clinic-a": slice(0, 700), "clinic-b": slice(700, 1400)}


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


name, server = sys.argv[1:]
images, labels = torch.tensor(load_digits().data / 16).float(), torch.tensor(load_digits().target)
own = TensorDataset(images[ROWS[name]], labels[ROWS[name]])

module, directory = Digits(), Path(f"checkpoints-{name}")
trainer = pl.Trainer(
    max_epochs=10,
    strategy=DSSGDStrategy(server=server, participant=name, selection=LargestValues(0.1)),
    callbacks=[ModelCheckpoint(directory, filename="last", enable_version_counter=False)],
    logger=False,
)
last = directory / "last.ckpt"
trainer.fit(
    module,
    train_dataloaders=DataLoader(own, batch_size=10, shuffle=True),
    ckpt_path=str(last) if last.exists() else None,
)
reached = accuracy(module.network(images[1400:]), labels[1400:], task="multiclass", num_classes=10)
print(f"{name}: accuracy {reached:.1%} on unseen images")
