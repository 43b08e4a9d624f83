"""Two clinics learn to read digits together, each on data of its own: python examples/participant.py"""

from concurrent.futures import ThreadPoolExecutor

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ppdl import (
    CommunicationCost,
    DSSGDStrategy,
    LargestValues,
    ParameterServer,
    RoundRobin,
    serve,
)

torch.set_num_threads(1)  # each clinic is a thread of this process, and one torch thread will do
CLINICS = {"clinic-a": slice(0, 700), "clinic-b": slice(700, 1400)}
IMAGES, LABELS = torch.tensor(load_digits().data / 16).float(), torch.tensor(load_digits().target)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.cost = CommunicationCost(unit="kB")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def on_train_epoch_start(self) -> None:
        self.cost.reset()

    def on_train_epoch_end(self) -> None:
        assert isinstance(self.trainer.strategy, DSSGDStrategy)
        self.cost.update(self.trainer.strategy.reports)
        self.log("kilobytes", self.cost)  # of this epoch; for a logger, if there is one

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def participate(name: str) -> None:
    own = TensorDataset(IMAGES[CLINICS[name]], LABELS[CLINICS[name]])
    strategy = DSSGDStrategy(server="memory://digits", participant=name, selection=LargestValues(0.1))
    module = Digits()
    # Lightning's progress bars cannot share a terminal; a participant in a process of its own may have one.
    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "logger"), False)
    trainer = pl.Trainer(max_epochs=10, strategy=strategy, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, train_dataloaders=DataLoader(own, batch_size=10, shuffle=True))
    unseen = DataLoader(TensorDataset(IMAGES[1400:], LABELS[1400:]), batch_size=100)
    (measured,) = trainer.test(module, unseen, verbose=False)
    print(
        f"{name}: accuracy {measured['accuracy']:.1%} on unseen images, "
        f"{module.cost.total:.0f} kB up and down in ten rounds"
    )


server = serve("memory://digits", ParameterServer(protocol=RoundRobin(), members=list(CLINICS)))
with ThreadPoolExecutor() as threads:
    list(threads.map(participate, CLINICS))
print(f"the server merged {server.status().uploads} updates, {server.status().uploaded_bytes} bytes in all")
