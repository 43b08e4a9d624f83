"""Finding the k-th largest magnitude of P values: numpy's partition, torch.topk, torch.kthvalue.

LargestValues builds on the first of them, after a sample has told roughly where the cut lies. They take
turns on the same values; medians in milliseconds, and the whole of LargestValues.select beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from support import print_table
from torch import Tensor

from lightning_ppdl.selection import LargestValues


def partition(magnitude: Tensor, count: int) -> Tensor:
    place = magnitude.numel() - count
    return torch.from_numpy(np.partition(magnitude.numpy(), place)[place : place + 1])[0]


def topk(magnitude: Tensor, count: int) -> Tensor:
    return magnitude.topk(count, sorted=False).values.min()


def kthvalue(magnitude: Tensor, count: int) -> Tensor:
    return magnitude.kthvalue(magnitude.numel() - count + 1).values


def seconds(run: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    options.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.01])
    options.add_argument("--repetitions", type=int, default=7)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    ways = {"numpy partition": partition, "torch.topk": topk, "torch.kthvalue": kthvalue}
    rows = []
    for size in arguments.sizes:
        delta = torch.randn(size, generator=torch.Generator().manual_seed(0))
        magnitude = delta.abs()
        for fraction in arguments.fractions:
            selection = LargestValues(fraction)
            count = selection.count(size)
            assert len({float(way(magnitude, count)) for way in ways.values()}) == 1
            times: dict[str, list[float]] = {name: [] for name in [*ways, "select"]}
            for _ in range(arguments.repetitions):
                for name, way in ways.items():
                    times[name].append(seconds(way, magnitude, count))
                times["select"].append(seconds(selection.select, delta, torch.Generator()))
            medians = [median(values) for values in times.values()]
            best_torch = min(medians[1:3])
            rows.append(
                [
                    f"P = {size:,}, fraction {fraction}",
                    *(f"{1000 * value:.3f}" for value in medians),
                    f"{best_torch / medians[0]:.1f} x",
                ]
            )
    print_table(["ms", *ways, "whole selection", "partition is faster by"], rows)


if __name__ == "__main__":
    main()
