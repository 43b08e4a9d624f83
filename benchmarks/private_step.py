"""What privacy of records costs a training step: the paper's MLP (1024-128-64-10), 60 records, CPU.

The kinds take turns within one process, each a block of consecutive steps at a time, so that noise drawn
ahead in the background has to keep up; within a repetition every block is compared with the plain one.
Ours draws its noise from the cryptographic source, and counts it; Opacus draws from torch's ordinary
generator (its ``secure_mode`` is slower). One thread for arithmetic; our noise is made by another, which may
use a second core, so the process's CPU seconds are printed too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from support import parser, print_table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl.models import mlp
from lightning_ppdl.privacy.noise import NoiseAhead, SecretNoise
from lightning_ppdl.privacy.record.capture import Capture
from lightning_ppdl.privacy.record.clipping import ClippedSum, NoisyGradient

BATCH, CLIP, SIGMA, RATE = 60, 1.0, 1.0, 0.05
INPUTS, LABELS = torch.randn(BATCH, 1, 32, 32), torch.randint(10, (BATCH,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return mlp((1, 32, 32), 10)


def plain() -> Callable[[], None]:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), RATE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(INPUTS), LABELS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours() -> Callable[[], None]:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    capture = Capture(module)
    parameters = list(capture.parameters.values())
    clipped = ClippedSum(parameters, CLIP)
    noise = NoiseAhead(SecretNoise(), clipped.total.numel())
    gradient = NoisyGradient(parameters, SIGMA * CLIP, BATCH, noise.gaussian)

    def step() -> None:
        optimizer.zero_grad()
        capture.begin(BATCH)
        F.cross_entropy(module(INPUTS), LABELS).backward()  # type: ignore[no-untyped-call]
        clipped.add(capture.end(), BATCH)
        gradient.write(clipped)
        clipped.reset()
        optimizer.step()

    return step


def opacus(mode: str) -> Callable[[], None]:
    module = network()
    loader = DataLoader(TensorDataset(INPUTS, LABELS), BATCH)
    made: Any = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), RATE),
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer = made[0], made[1]
    criterion: Callable[[Tensor, Tensor], Any] = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(INPUTS), LABELS).backward()
        optimizer.step()

    return step


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=20)
    options.add_argument("--steps", type=int, default=40, help="in each block")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    kinds = {
        "plain": plain(),
        "private (ours)": ours(),
        "Opacus, ghost clipping": opacus("ghost"),
        "Opacus, default hooks": opacus("hooks"),
    }
    wall: dict[str, list[float]] = {name: [] for name in kinds}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    for repetition in range(arguments.repetitions + 1):
        for name, step in kinds.items():
            step()
            started, used = time.perf_counter(), time.process_time()
            for _ in range(arguments.steps):
                step()
            if repetition:  # the first one warms up
                wall[name].append((time.perf_counter() - started) / arguments.steps)
                cpu[name].append((time.process_time() - used) / arguments.steps)
    rows = []
    for name in kinds:
        ratios = [mine / base for mine, base in zip(wall[name], wall["plain"], strict=True)]
        work = [mine / base for mine, base in zip(cpu[name], cpu["plain"], strict=True)]
        rows.append(
            [
                name,
                f"{1000 * median(wall[name]):.2f}",
                f"{median(ratios):.2f}",
                f"{1000 * median(cpu[name]):.2f}",
                f"{median(work):.2f}",
            ]
        )
    print_table(["a step", "ms", "x plain", "CPU ms", "x plain"], rows)
    ratio = float(rows[1][2])
    print(f"a private step: {ratio:.2f} x; target at most 4, {'reached' if ratio <= 4 else 'MISSED'}; aim 2")


if __name__ == "__main__":
    main()
