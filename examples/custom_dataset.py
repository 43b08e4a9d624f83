"""Data of your own in a simulation: anything with ``load()`` that returns ``Splits``.

    python examples/custom_dataset.py

The same source from the command line, through the group file ``examples/conf/data/wine.yaml``:

    PYTHONPATH=examples ppdl simulate --config-dir examples/conf data=wine model=linear participants=3
"""

from dataclasses import dataclass
from functools import partial
from statistics import mean

import numpy as np
import torch
from sklearn.datasets import load_wine

from lightning_ppdl.data import ArrayDataset, Splits
from lightning_ppdl.models import linear
from lightning_ppdl.partition import IID
from lightning_ppdl.simulation import Simulation, simulate

# What a chemist would write down before seeing a bottle: the usual level of each of the 13 measurements,
# and how far it strays. Constants that were computed from the data would say something about it.
USUAL = np.array([13, 2.3, 2.4, 20, 100, 2.3, 2, 0.36, 1.6, 5, 1, 2.6, 750], dtype=np.float32)
SPREAD = np.array([1, 1, 0.3, 3, 15, 0.6, 1, 0.12, 0.6, 2.3, 0.2, 0.7, 300], dtype=np.float32)


@dataclass(frozen=True)
class Wine:
    """Three vineyards' wines: 178 rows of 13 measurements; ships with scikit-learn.

    Args:
        test_rows: How many rows, drawn at random, are held back for the test.
        seed: Draws them.
    """

    test_rows: int = 58
    seed: int = 0

    def load(self) -> Splits:
        """Read the table, and put it on a common scale."""
        table = load_wine()
        rows = torch.from_numpy(((table.data - USUAL) / SPREAD).astype(np.float32))
        wines = ArrayDataset(rows, torch.from_numpy(table.target.astype(np.int64)))
        order = np.random.default_rng(self.seed).permutation(len(wines))
        return Splits(
            train=wines.subset(order[self.test_rows :]),
            test=wines.subset(order[: self.test_rows]),
            input_shape=(13,),
            classes=3,
        )


def main() -> None:
    study = Simulation(
        data=Wine(),
        partition=IID(),
        model=linear,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        participants=3,
        rounds=10,
        batch_size=5,
        baselines=("standalone",),
    )
    results = simulate(study)
    assert results.standalone is not None
    print(f"collaborative: accuracy {results.rows[-1].accuracy:.1%}")
    print(f"standalone, mean of 3: accuracy {mean(results.standalone.final):.1%}")


if __name__ == "__main__":
    main()
