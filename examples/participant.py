"""A participant is a module, a strategy and fit(). Here two of them work together in one process.

    python examples/participant.py

Each trains on its own half of the handwritten digits that ship with scikit-learn; after every epoch a
tenth of the changes of its parameters goes to the server, and nothing else does.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import DSSGDStrategy, LargestValues, ParameterServer, RoundRobin, serve

SERVER = "memory://digits"
CLINICS = ["clinic-a", "clinic-b"]
QUIET: dict[str, Any] = dict.fromkeys(
    ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        with torch.no_grad():
            return float((self.network(images).argmax(1) == labels).float().mean())


def train(participant: str, images: Tensor, labels: Tensor) -> Digits:
    """All that a participant does: name the strategy, and fit."""
    shuffle = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(images, labels), batch_size=10, shuffle=True, generator=shuffle)
    strategy = DSSGDStrategy(server=SERVER, participant=participant, selection=LargestValues(fraction=0.1))
    module = Digits()
    pl.Trainer(max_epochs=10, strategy=strategy, **QUIET).fit(module, train_dataloaders=loader)
    return module


def main() -> None:
    torch.set_num_threads(1)  # two threads train: one torch thread for each is fastest
    table = load_digits()
    images = torch.from_numpy(table.data / 16).float()
    labels = torch.from_numpy(table.target).long()
    halves = [slice(0, 700), slice(700, 1400)]
    server = serve(SERVER, ParameterServer(protocol=RoundRobin(), members=CLINICS))
    with ThreadPoolExecutor() as threads:
        modules = list(threads.map(train, CLINICS, [images[h] for h in halves], [labels[h] for h in halves]))
    for name, module in zip(CLINICS, modules):
        print(f"{name}: accuracy {module.accuracy(images[1400:], labels[1400:]):.1%} on unseen images")
    status = server.status()
    print(f"the server merged {status.uploads} updates, {status.uploaded_bytes} bytes in all")


if __name__ == "__main__":
    main()
