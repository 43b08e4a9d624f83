"""Where batches come from: modules of data, several loaders, and streams that do not know their length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from strategy_harness import (
    Tiny,
    add_server,
    everything,
    flat,
    loader,
    one_thread,
    require_close,
    rounds,
    trainer,
    url,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate
from trainer_harness import require_left, require_plain

from lightning_ppdl import DSSGDStrategy, ParticipantLevel
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.accounting import total
from lightning_ppdl.privacy.ledger import Ledger

__all__ = ["one_thread", "url"]


class Data(pl.LightningDataModule):
    """Other training data every time that it is asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> Any:
        self.asked += 1
        return loader(self.asked, batches=3 + self.asked)

    def val_dataloader(self) -> Any:
        return loader(20)


@pytest.mark.parametrize(
    ("round_length", "reload", "asked", "ends"),
    [
        ("epoch", 0, 1, [4, 8, 12]),
        (5, 0, 1, [5, 10, 12]),
        # Epochs of 4, 5 and 6 batches.
        ("epoch", 1, 3, [4, 9, 15]),
        (5, 1, 3, [5, 10, 15]),
        ("epoch", 2, 2, [4, 8, 13]),
    ],
)
def test_a_data_module(url: str, round_length: Any, reload: int, asked: int, ends: list[int]) -> None:
    modules: list[Data] = []

    def data() -> dict[str, Any]:
        modules.append(Data())
        return {"datamodule": modules[-1]}

    settings: dict[str, Any] = {"data": data, "reload_dataloaders_every_n_epochs": reload}
    assert require_plain(url, {"round_length": round_length}, **settings).ends == ends
    assert [module.asked for module in modules] == [asked, asked]
    assert [module.stages for module in modules] == [["fit"], ["fit"]]


class Paired(Tiny):
    """Takes what several loaders give."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = list(batch.values())
        losses = [nn.functional.mse_loss(self(x), y) for x, y in (pair for pair in batch if pair is not None)]
        return torch.stack(losses).sum()


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (lambda: {"a": loader(1), "b": loader(2, batches=4)}, [6, 12, 18]),
        (lambda: [loader(1), loader(2, batches=4)], [6, 12, 18]),
        (lambda: CombinedLoader([loader(1), loader(2, batches=4)], "min_size"), [4, 8, 12]),
        (lambda: CombinedLoader([loader(1), loader(2, batches=4)], "max_size"), [6, 12, 18]),
        (lambda: CombinedLoader([loader(1), DataLoader(Stream(4), batch_size=4)], "min_size"), [4, 8, 12]),
    ],
)
def test_several_loaders(url: str, make: Callable[[], Any], ends: list[int]) -> None:
    def data() -> dict[str, Any]:
        return {"train_dataloaders": make()}

    assert require_plain(url, module=Paired, data=data).ends == ends


class Stream(IterableDataset[Any]):
    """Does not know how long it is.

    Args:
        lengths: Batches of four, epoch by epoch; the last for all that follow.
    """

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        length = self.lengths[min(self.epoch, len(self.lengths) - 1)]
        stream = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        for _ in range(4 * length):
            x = torch.randn(5, generator=stream)
            yield x, x[:2]


def streaming(*lengths: int) -> Callable[[], dict[str, Any]]:
    def data() -> dict[str, Any]:
        return {"train_dataloaders": DataLoader(Stream(*lengths), batch_size=4), "val_dataloaders": loader(2)}

    return data


@pytest.mark.parametrize(
    ("lengths", "round_length", "settings", "ends"),
    [
        ((6,), 4, {}, [4, 8, 12, 16, 18]),
        ((5, 2, 3), "epoch", {}, [5, 7, 10]),
        ((5, 2, 3), 4, {}, [4, 8, 10]),
        ((6,), "epoch", {"max_steps": 8}, [6, 8]),
        ((6,), "epoch", {"max_steps": 8, "epochs": -1}, [6, 8]),
        ((6,), 4, {"max_steps": 10, "epochs": -1}, [4, 8, 10]),
        ((100,), "epoch", {"max_steps": 7, "epochs": None}, [7]),
        ((6,), "epoch", {"limit_train_batches": 4}, [4, 8, 12]),
        ((6,), "epoch", {"accumulate_grad_batches": 4}, [2, 4, 6]),
        ((6,), 4, {"val_check_interval": 3}, [4, 8, 12, 16, 18]),
        ((4, 0, 4), "epoch", {}, [4, 8]),
    ],
)
def test_streams(
    url: str, lengths: tuple[int, ...], round_length: Any, settings: dict[str, Any], ends: list[int]
) -> None:
    data = streaming(*lengths)
    assert require_plain(url, {"round_length": round_length}, data=data, **settings).ends == ends


@pytest.mark.parametrize(
    ("module", "make"),
    [
        (Tiny, lambda: DataLoader(Stream(6), batch_size=4)),
        (Paired, lambda: [loader(1), DataLoader(Stream(6), batch_size=4)]),
        (Paired, lambda: {"a": loader(1), "b": loader(2, batches=4)}),
        (Paired, lambda: CombinedLoader([loader(1), loader(2)], "min_size")),
    ],
    ids=["a stream", "a loader and a stream", "loaders by name", "combined loaders"],
)
def test_a_checkpoint_whatever_gives_the_batches(
    url: str, tmp_path: Path, module: Callable[[], Tiny], make: Callable[[], Any]
) -> None:
    """One that Lightning makes by itself, and training on from it."""
    server = add_server(url)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    made = trainer(everything(url), 2, callbacks=[keep], enable_checkpointing=True)
    made.fit(module(), make())
    trained = module()
    resumed = trainer(everything(url), 3)
    resumed.fit(trained, make(), ckpt_path=tmp_path / "last.ckpt")
    assert [report.round for report in rounds(resumed)] == [3]
    require_left(server, 3)
    require_close(server.parameters(), flat(trained))


@pytest.mark.parametrize(
    ("round_length", "settings", "planned"),
    [("epoch", {}, 3), (2, {"max_steps": 5, "epochs": -1}, 3)],
)
def test_noise_is_calibrated_for_the_rounds_that_a_stream_will_have(
    url: str, round_length: Any, settings: dict[str, Any], planned: int
) -> None:
    """A target for the whole run: all of it, and no more, is spent at the end."""
    server = add_server(url)
    privacy = ParticipantLevel(epsilon=8.0, delta=1e-5)
    ledger = Ledger(None)
    strategy = DSSGDStrategy(url, "anna", privacy=privacy, ledger=ledger, round_length=round_length)
    made = trainer(strategy, **{"epochs": 3, **settings})
    made.fit(Tiny(), **streaming(6)())
    assert len(ledger.events()) == len(rounds(made)) == server.status().uploads == planned
    assert 7.9 < total(ledger.events(), 1e-5).epsilon <= 8.0


def test_noise_is_not_calibrated_for_rounds_that_nobody_can_count(url: str) -> None:
    server = add_server(url)
    privacy = ParticipantLevel(epsilon=8.0, delta=1e-5)
    strategy = DSSGDStrategy(url, "anna", privacy=privacy, ledger=Ledger(None), round_length=2)
    with pytest.raises(ConfigurationError, match="max_steps"):
        trainer(strategy, epochs=3).fit(Tiny(), **streaming(6)())
    assert server.status().members == ()


class Gaps:
    """Makes batches, and None in the place of every third."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, items: list[Any]) -> Any:
        self.calls += 1
        return None if self.calls % 3 == 0 else default_collate(items)


@pytest.mark.parametrize(("round_length", "ends"), [("epoch", [4, 8, 12]), (3, [3, 6, 9, 12])])
def test_a_batch_that_is_none_is_no_step(url: str, round_length: Any, ends: list[int]) -> None:
    """The last one of each epoch is one."""

    def data() -> dict[str, Any]:
        return {"train_dataloaders": DataLoader(loader().dataset, batch_size=4, collate_fn=Gaps())}

    assert require_plain(url, {"round_length": round_length}, data=data).ends == ends
