"""Accuracy per round of the paper's MLP on MNIST, for three upload fractions, against a target.

30 participants with 600 images each, round robin, largest values. Prints the test accuracy of the
server's parameters after each round and the bytes that the participants sent.
"""

from __future__ import annotations

from support import paper_job, parser, print_table

from lightning_ppdl.selection import LargestValues
from lightning_ppdl.simulation import simulate

# upload fraction, rounds, target
CASES = [(1.0, 4, 0.95), (0.1, 4, 0.95), (0.01, 8, 0.93)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    for fraction, rounds, target in CASES:
        results = simulate(
            paper_job(
                arguments.data_root, selection=LargestValues(fraction), rounds=rounds, seed=arguments.seed
            )
        )
        print(f"\nupload fraction {fraction}, {results.uploads} uploads in {results.seconds:.1f} s")
        header = ["round", "accuracy", "MB up", "MB down"]
        rows = [
            [str(row.round), f"{row.accuracy:.2%}", *(f"{b / 1e6:.2f}" for b in byte_counts)]
            for row in results.rows
            for byte_counts in [(row.uploaded_bytes, row.downloaded_bytes)]
        ]
        print_table(header, rows)
        reached = results.rows[-1].accuracy
        verdict = "reached" if reached >= target else "MISSED"
        print(f"target {target:.1%} after {rounds} rounds: {reached:.2%}, {verdict}")


if __name__ == "__main__":
    main()
