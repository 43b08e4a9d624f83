"""Cases of tables, series and molecules: FT-Transformer, temporal fusion transformer, message passing."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from support.published import Case, loaders

_PEOPLE = 3


class _Tabular(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0], None), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.make_parameter_groups(), 1e-3)  # type: ignore[operator]


def tabular(data: Any) -> Case:
    """FTTransformer: its last layers normalise, and its [CLS] embedding is a bare parameter."""
    from rtdl_revisiting_models import FTTransformer  # type: ignore[import-not-found]

    def make() -> _Tabular:
        network = FTTransformer(
            n_cont_features=16,
            cat_cardinalities=[],
            d_out=4,
            n_blocks=2,
            d_block=32,
            attention_n_heads=4,
            attention_dropout=0.1,
            ffn_d_hidden_multiplier=4 / 3,
            ffn_dropout=0.1,
            residual_dropout=0.0,
        )
        return _Tabular(network)

    table = make_classification(
        1600, 16, n_informative=8, n_classes=4, n_clusters_per_class=2, random_state=0
    )
    rows, classes = torch.tensor(table[0]).float(), torch.tensor(table[1])
    parts = [(rows[n::10][:150], classes[n::10][:150]) for n in range(_PEOPLE)]

    def measure(module: _Tabular) -> float:
        unseen = slice(3, None, 10)
        logits = module.network(rows[unseen], None)
        return float(multiclass_accuracy(logits, classes[unseen], 4, average="micro"))

    return Case(make, loaders(parts, 15), measure, "accuracy", epochs=20, strategy={"initial": 0})


def _series(count: int, seed: int) -> Any:
    """Long table of ``count`` series of 48 steps: a season of 12 steps, its phase, a trend and noise."""
    import pandas as pd  # type: ignore[import-untyped]

    stream, steps = np.random.default_rng(seed), np.arange(48)
    frames = []
    for number in range(count):
        season = np.sin((steps + stream.uniform(0, 12)) * 2 * np.pi / 12) * stream.uniform(0.5, 2)
        values = season + np.sign(season) + stream.normal(0, 0.02) * steps + stream.normal(0, 0.2, 48)
        columns = {"series": f"{seed}-{number}", "step": steps, "value": values.astype(np.float32)}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def forecasting(data: Any) -> Case:
    """TemporalFusionTransformer, with pytorch-forecasting's loss, optimizer and scheduler."""
    from pytorch_forecasting import (  # type: ignore[import-not-found]
        EncoderNormalizer,
        QuantileLoss,
        TemporalFusionTransformer,
        TimeSeriesDataSet,
    )

    def table(count: int, seed: int) -> Any:
        # The normaliser is fitted to each window's past: no constants of one participant's data.
        return TimeSeriesDataSet(
            _series(count, seed),
            time_idx="step",
            target="value",
            group_ids=["series"],
            max_encoder_length=24,
            max_prediction_length=6,
            time_varying_unknown_reals=["value"],
            target_normalizer=EncoderNormalizer(),
        )

    unseen, shape = table(12, seed=99), table(2, seed=98)

    def make() -> Any:
        return TemporalFusionTransformer.from_dataset(
            shape,
            hidden_size=8,
            lstm_layers=1,
            attention_head_size=2,
            hidden_continuous_size=4,
            dropout=0.05,
            loss=QuantileLoss([0.1, 0.5, 0.9]),
            learning_rate=5e-3,
            optimizer="adam",
            log_interval=-1,
        )

    def batches(seed: int) -> Any:
        return table(5, seed).to_dataloader(train=True, batch_size=16, num_workers=0)

    def measure(module: Any) -> float:
        losses = []
        for x, y in unseen.to_dataloader(train=False, batch_size=256, num_workers=0):
            losses.append(module.loss.loss(module(x).prediction, y[0]).mean())
        return float(torch.stack(losses).mean())

    return Case(
        make,
        [partial(batches, seed) for seed in range(_PEOPLE)],
        measure,
        "loss",
        epochs=8,
        strategy={"initial": "own"},
        trainer={"gradient_clip_val": 0.1},
        package="lightning.pytorch",
    )


def _molecules(count: int, seed: int) -> list[tuple[str, float]]:
    """SMILES of chains and rings of common groups, and their logP by Crippen's rules."""
    from rdkit.Chem import MolFromSmiles  # type: ignore[import-not-found]
    from rdkit.Chem.Crippen import MolLogP  # type: ignore[import-not-found]

    groups = ["C", "CC", "C(C)C", "C(=O)N", "C(O)C", "C(F)C", "C(Cl)C", "c1ccc(cc1)", "C(N)C", "COC", "CSC"]
    stream = np.random.default_rng(seed)
    made = ["C" + "".join(stream.choice(groups, stream.integers(2, 6))) + "C" for _ in range(count)]
    return [(smiles, MolLogP(MolFromSmiles(smiles))) for smiles in made]


def molecules(data: Any) -> Case:
    """chemprop's MPNN, as its documentation builds it: its loss, metrics, optimizer and warm-up."""
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader  # type: ignore[import-not-found]
    from chemprop.models import MPNN  # type: ignore[import-not-found]
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN  # type: ignore[import-not-found]

    def table(count: int, seed: int) -> Any:
        points = [MoleculeDatapoint.from_smi(s, np.array([y])) for s, y in _molecules(count, seed)]
        return MoleculeDataset(points)

    def make() -> Any:
        passing = BondMessagePassing(d_h=48, depth=3)
        head = RegressionFFN(input_dim=48, hidden_dim=32)
        return MPNN(
            passing, MeanAggregation(), head, batch_norm=True, max_lr=5e-3, init_lr=5e-4, final_lr=5e-4
        )

    unseen = table(300, seed=99)

    def measure(module: Any) -> float:
        (batch,) = build_dataloader(unseen, batch_size=300, num_workers=0, shuffle=False)
        return float((module(batch.bmg)[:, 0] - batch.Y[:, 0]).square().mean().sqrt())

    def batches(seed: int) -> Any:
        return build_dataloader(table(40, seed), batch_size=10, num_workers=0, seed=seed)

    return Case(
        make,
        [partial(batches, seed) for seed in range(_PEOPLE)],
        measure,
        "RMSE",
        epochs=30,
        strategy={"initial": 0, "share_buffers": "bn.running_*"},
        package="lightning.pytorch",
    )
