"""What a private release costs beside the plain one, LargestValues: P = 140,106 entries, c = 14,010 uploads.

They take turns on the same update; medians in milliseconds, and how many times the plain release's. The
sparse vector mechanism is timed where its noise decides (epsilon 1) and where the update does (a million).
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from support import print_table

from lightning_ppdl.privacy.noise import SecretNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.release import PlainRelease, Release
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.selection import LargestValues, RandomFraction, Selection


def releases(fraction: float) -> dict[str, Release]:
    """Every release by its name, the plain one first."""
    made: dict[str, Release] = {"plain, largest values": PlainRelease(LargestValues(fraction), bound=1e-3)}
    for variant in ("standard", "paper"):
        for epsilon in (1.0, 1e6):
            mechanism = SparseVector(epsilon, fraction, variant=variant)
            made[f"sparse vector, {variant}, epsilon {epsilon:g}"] = mechanism.make_release(
                None, None, SecretNoise()
            )
    gaussian = ParticipantLevel(noise_multiplier=1.0, delta=1e-5)
    selections: dict[str, Selection | None] = {
        "largest values": LargestValues(fraction),
        "random fraction": RandomFraction(fraction),
        "all entries": None,
    }
    for name, selection in selections.items():
        made[f"participant level, {name}"] = gaussian.make_release(selection, None, SecretNoise())
    return made


def exact_releases(fraction: float) -> dict[str, Release]:
    noise = SecretNoise()
    return {
        "sparse vector, standard, exact": SparseVector(1.0, fraction, exact=True).make_release(
            None, None, noise
        ),
        "participant level, random fraction, exact": ParticipantLevel(
            noise_multiplier=1.0, delta=1e-5, exact=True
        ).make_release(RandomFraction(fraction), None, noise),
    }


def milliseconds(release: Release, delta: torch.Tensor, generator: torch.Generator) -> float:
    started = time.perf_counter()
    release.release(delta, generator)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--size", type=int, default=140_106)
    options.add_argument("--fraction", type=float, default=0.1)
    options.add_argument("--repetitions", type=int, default=31)
    options.add_argument("--exact", action="store_true", help="the exact samplers too, which take seconds")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    delta = 1e-3 * torch.randn(arguments.size, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    made = releases(arguments.fraction)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(arguments.repetitions):
        for name, release in made.items():
            times[name].append(milliseconds(release, delta, generator))
    if arguments.exact:
        for name, release in exact_releases(arguments.fraction).items():
            times[name] = [milliseconds(release, delta, generator)]
    medians = {name: median(values) for name, values in times.items()}
    plain = next(iter(medians.values()))
    rows = [[name, f"{value:.2f}", f"{value / plain:.1f} x"] for name, value in medians.items()]
    print_table(["release", "ms", "of the plain one"], rows)


if __name__ == "__main__":
    main()
