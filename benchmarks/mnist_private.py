"""Test accuracy on MNIST under record-level differential privacy, without a trusted server.

90 participants with 600 images each. Every participant takes one private step a round on frozen
scattering features and adds all of its own noise. Epsilon is the total over the whole run, at
delta = 1e-5, for the presence or absence of one image. The settings were chosen on the 6,000 training
images that nobody holds; `--public` measures on these again, mnist_private_search.py repeats the choice.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

from support import parser, print_table
from support.private_digits import Settings, measured_on_public_images, private_job, scattered_mnist

from lightning_ppdl.simulation import simulate


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--public", action="store_true", help="measure on the images nobody holds")
    options.add_argument("--json", type=Path, help="write the accuracies, for mnist_private_figure.py")
    arguments = options.parse_args()
    splits = scattered_mnist(arguments.data_root)
    rows = []
    found: dict[str, list[float]] = {}
    for epsilon in arguments.epsilons:
        accuracies = []
        for seed in arguments.seeds:
            used = measured_on_public_images(splits, seed) if arguments.public else splits
            results = simulate(private_job(used, epsilon, seed, Settings()))
            accuracies.append(results.rows[-1].accuracy)
            print(
                f"epsilon {epsilon:g}, seed {seed}: {accuracies[-1]:.2%} in {results.seconds:.0f} s",
                flush=True,
            )
        found[f"{epsilon:g}"] = accuracies
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        rows.append([f"{epsilon:g}", f"{mean(accuracies):.2%}", f"{spread:.2%}", f"{min(accuracies):.2%}"])
    print(f"\nfinal accuracy over seeds {arguments.seeds}")
    print_table(["epsilon", "mean", "deviation", "worst"], rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
