"""Two clinics learn to read digits together, each on data of its own: python examples/participant.py"""

from concurrent.futures import ThreadPoolExecutor

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import DSSGDStrategy, LargestValues, ParameterServer, RoundRobin, serve

torch.set_num_threads(1)  # each clinic is a thread of this process, and one torch thread will do
CLINICS = {"clinic-a": slice(0, 700), "clinic-b": slice(700, 1400)}
IMAGES, LABELS = torch.tensor(load_digits().data / 16).float(), torch.tensor(load_digits().target)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

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
    right = module.network(IMAGES[1400:]).argmax(1) == LABELS[1400:]
    print(f"{name}: accuracy {right.float().mean():.1%} on unseen images")


server = serve("memory://digits", ParameterServer(protocol=RoundRobin(), members=list(CLINICS)))
with ThreadPoolExecutor() as threads:
    list(threads.map(participate, CLINICS))
print(f"the server merged {server.status().uploads} updates, {server.status().uploaded_bytes} bytes in all")
