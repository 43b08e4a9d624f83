"""Server and participants killed at random instants, connections cut, the disk full: minutes of it.

    python benchmarks/chaos.py --seconds 120

What was done, and what came of it: every acknowledged upload must be in the parameters exactly once, and the
ledgers must count no less than was sent. A violation is printed, and ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integration"))

from chaos_harness import Chaos


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each protocol")
    parser.add_argument("--participants", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    failed = False
    for protocol in ("asynchronous", "round_robin"):
        with tempfile.TemporaryDirectory() as directory:
            run = Chaos(Path(directory), protocol, settings.participants, settings.seed)
            outcome = asdict(run.run(settings.seconds))
        print(protocol)
        for name, value in outcome.items():
            print(f"  {name.replace('_', ' '):24}{value}")
        failed = failed or bool(outcome["violations"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
