"""A Hydra application of your own that uses our configuration groups; see conf/config.yaml beside it.

python examples/hydra_app/app.py
python examples/hydra_app/app.py ppdl/selection=random_above_threshold ppdl.selection.fraction=0.05
python examples/hydra_app/app.py --multirun ppdl.selection.fraction=1.0,0.1,0.01
"""

from concurrent.futures import ThreadPoolExecutor

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

import lightning_ppdl


class Softmax(pl.LightningModule):
    """Logistic regression on handwritten digits, 8 x 8."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layer(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    table = load_digits()
    images, labels = torch.from_numpy(table.data / 16).float(), torch.from_numpy(table.target).long()

    def train(position: int) -> None:
        mine = slice(position, 1400, len(cfg.participants))
        loader = DataLoader(TensorDataset(images[mine], labels[mine]), batch_size=10)
        strategy = instantiate(cfg.strategy, participant=cfg.participants[position])
        trainer = instantiate(cfg.trainer, strategy=strategy)
        trainer.fit(Softmax(cfg.learning_rate), train_dataloaders=loader)

    server = lightning_ppdl.serve(cfg.strategy.server, instantiate(cfg.server))
    with ThreadPoolExecutor() as threads:
        list(threads.map(train, range(len(cfg.participants))))
    lightning_ppdl.close(cfg.strategy.server)  # so that the next job of a sweep starts anew

    vector = torch.from_numpy(server.parameters())
    weight, bias = vector[:640].view(10, 64), vector[640:]
    logits = images[1400:] @ weight.T + bias
    accuracy = float(multiclass_accuracy(logits, labels[1400:], num_classes=10, average="micro"))
    print(
        f"{cfg.ppdl.selection._target_}: accuracy {accuracy:.1%}, {server.status().uploaded_bytes} bytes up"
    )


if __name__ == "__main__":
    main()
