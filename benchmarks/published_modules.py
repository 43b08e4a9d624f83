"""Modules that others published, as participants: what each needed, what it gained, and what it cost.

Three participants with little data each take turns (round robin, the default selection: a tenth of the
values after every epoch), each with a real Trainer. Beside them the same three train alone, from the same
initial parameters: for as many epochs, and, as the shared parameters go through everybody's steps, for
three times as many ("longer"). The figure is of data that nobody holds: before training, and after it,
averaged over the three, each with its own parameters. Data are made up or ship with scikit-learn; weights are
random; everything follows from one seed. Last comes what an epoch costs under the strategy, in CPU
seconds, against the plain Trainer.

The packages are not among this project's extras. An environment for them:

    python -m venv zoo
    zoo/bin/pip install 'lightning_ppdl[simulate]' transformers peft monai diffusers \\
        rtdl-revisiting-models pytorch-forecasting chemprop

A module whose package is missing is named and skipped. Exit status: 0 if all ran, 77 if some were
skipped and the others ran, 1 if one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from support import print_table
from support.published import Case, Outcome, run

from lightning_ppdl.simulation.quiet import quiet_lightning

SKIPPED = 77  # what automake's tests exit with when they could not run


class Published(NamedTuple):
    """A case and where it comes from: distributions on PyPI, and the names that they are imported by."""

    title: str
    home: str
    make: str
    packages: dict[str, str]


_LIGHTNING = {"lightning": "lightning", "lightning_ppdl": "lightning_ppdl.lightning"}
MODULES = {
    "bert": Published("BERT, classifier", "text", "classifier", {"transformers": "transformers"}),
    "lora": Published("LoRA on GPT-2", "text", "adapters", {"peft": "peft", "transformers": "transformers"}),
    "unet": Published("U-Net, buffers shared", "images", "segmentation", {"monai": "monai"}),
    "unet-local": Published(
        "U-Net, buffers local", "images", "segmentation_with_local_buffers", {"monai": "monai"}
    ),
    "gan": Published("GAN", "images", "gan", {"monai": "monai"}),
    "diffusion": Published("diffusion U-Net", "images", "diffusion", {"diffusers": "diffusers"}),
    "ft": Published(
        "FT-Transformer", "tables", "tabular", {"rtdl-revisiting-models": "rtdl_revisiting_models"}
    ),
    "tft": Published(
        "temporal fusion transformer",
        "tables",
        "forecasting",
        {"pytorch-forecasting": "pytorch_forecasting", **_LIGHTNING},
    ),
    "mpnn": Published(
        "message passing network", "tables", "molecules", {"chemprop": "chemprop", **_LIGHTNING}
    ),
}


def missing(published: Published) -> list[str]:
    return [name for name, imported in published.packages.items() if find_spec(imported) is None]


def described(published: Published) -> str:
    """The package that the module comes from, with its version."""
    name = next(iter(published.packages))
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def row(published: Published, case: Case, outcome: Outcome) -> list[str]:
    figures = outcome.before, *(mean(each) for each in (outcome.alone, outcome.longer, outcome.together))
    up, down = outcome.upload_bytes / 1000, outcome.download_bytes / 1000
    return [
        published.title,
        described(published),
        f"{outcome.parameters:,} of {outcome.of:,}",
        case.figure,
        *(f"{figure:.3f}" for figure in figures),
        f"{up:.1f} / {down:.1f}",
        f"{outcome.overhead:.2f} x",
    ]


def configured(case: Case) -> str:
    """What the strategy and the Trainer were told besides server, participant and epochs."""
    told = [f"{name}={value!r}" for name, value in {**case.strategy, **case.trainer}.items()]
    return ", ".join(told)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", help=f"which modules: {', '.join(MODULES)}; all by default")
    options.add_argument("--mnist", type=Path, help="folder with MNIST's four files, for gan and diffusion")
    options.add_argument("--repetitions", type=int, default=3, help="of the measurement of overhead")
    arguments = options.parse_args()
    if unknown := set(arguments.names) - set(MODULES):
        options.error(f"{unknown.pop()!r} is none of {', '.join(MODULES)}")
    torch.set_num_threads(1)
    rows, notes, skipped, failed = [], [], [], []
    for name in arguments.names or MODULES:
        published, started = MODULES[name], time.perf_counter()
        if lacking := missing(published):
            print(f"SKIPPED {name}: pip install --upgrade {' '.join(lacking)}", flush=True)
            skipped.append(name)
            continue
        try:
            case: Case = getattr(import_module(f"support.published_{published.home}"), published.make)(
                arguments.mnist
            )
            with quiet_lightning():
                outcome = run(case, arguments.repetitions)
        except Exception:
            traceback.print_exc()
            print(f"FAILED {name}", flush=True)
            failed.append(name)
            continue
        rows.append(row(published, case, outcome))
        notes.append(f"{name}: {outcome.tensors} tensors; {case.package}; {configured(case)}")
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    report(rows, notes, skipped, failed)
    sys.exit(1 if failed else SKIPPED if skipped else 0)


def report(rows: list[list[str]], notes: list[str], skipped: list[str], failed: list[str]) -> None:
    header = ["module", "package", "shared", "figure", "before", "alone", "longer", "together"]
    header += ["kB up / down", "epoch"]
    if rows:
        print_table(header, rows)
        print("\nconfigured:", *notes, sep="\n  ")
    lists: dict[str, Any] = {"skipped": skipped, "failed": failed}
    counts = ", ".join(f"{len(names)} {what} ({', '.join(names)})" for what, names in lists.items() if names)
    print(f"{len(rows)} modules ran{', ' + counts if counts else ''}")


if __name__ == "__main__":
    main()
