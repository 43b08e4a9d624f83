"""``ppdl plan``: what a private run would cost, over a sweep of settings, and what noise leaves of it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_ppdl import config
from lightning_ppdl.cli.application import build, refuse_unknown, run_application
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.plan_report import FILES, Row, plan_table, write_plan
from lightning_ppdl.planning import Collaboration, Forecast, forecast
from lightning_ppdl.privacy.mechanism import Mechanism


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    for argument in arguments:
        if argument.startswith("privacy=["):  # which Hydra explains in words of its own
            print(
                f"ppdl plan: {argument}: the group privacy takes one value, e.g. privacy=record; only "
                f"settings can be swept, so run ppdl plan once for each mechanism",
                file=sys.stderr,
            )
            return 2
    config.register()
    return run_application("plan", _task, arguments)


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.PlanConfig)
    directory = Path(HydraConfig.get().runtime.output_dir)
    for name in FILES:  # an interrupted run must not leave an older one's as its own
        (directory / name).unlink(missing_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    swept = _swept(cfg)
    rows = []
    with Progress(*columns, console=console, transient=True) as bar:
        combinations = list(itertools.product(*swept.values()))
        task = bar.add_task("accounting", total=len(combinations))
        for values in combinations:
            settings = dict(zip(swept, values))
            rows.append(Row(settings, _forecast(cfg, settings)))
            bar.update(task, advance=1)
    write_plan(rows, directory)
    console.print(plan_table(rows, HydraConfig.get().runtime.choices["privacy"]))
    console.print(f"plan.csv and plan.png are in {directory}", soft_wrap=True)


def _swept(cfg: DictConfig) -> dict[str, list[Any]]:
    """The settings that were given as lists, in the order of the configuration."""
    found = {}
    for key, value in _leaves(cfg, ""):
        if isinstance(value, ListConfig):
            if not len(value):
                raise ConfigurationError(f"{key}=[]: give at least one value, e.g. {key}=[10,30]")
            found[key] = list(value)
    return found


def _leaves(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    for key in node:
        value = node[key]
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{prefix}{key!s}.")
        else:
            yield f"{prefix}{key!s}", value


def _forecast(cfg: DictConfig, settings: dict[str, Any]) -> Forecast:
    one = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(one, DictConfig)
    for key, value in settings.items():
        OmegaConf.update(one, key, value)
    mechanism = build(one, "privacy")
    if mechanism is None:
        raise ConfigurationError(
            "privacy=none adds no noise: there is no epsilon to plan; choose privacy=sparse_vector, "
            "participant or record"
        )
    if not isinstance(mechanism, Mechanism):
        raise ConfigurationError(f"privacy={mechanism!r} is no privacy mechanism")
    return forecast(
        mechanism,
        Collaboration(
            participants=one.participants,
            rounds=one.rounds,
            parameters=one.parameters,
            records=one.records,
            batch_size=one.batch_size,
            steps_per_round=one.steps_per_round,
        ),
    )
