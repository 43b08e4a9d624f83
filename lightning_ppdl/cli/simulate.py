"""``ppdl simulate``: from a configuration to a simulation, its progress bar and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_ppdl import config
from lightning_ppdl.cli.application import build, refuse_unknown, run_application
from lightning_ppdl.data import Features
from lightning_ppdl.report import closing_table, remove_report, write_report
from lightning_ppdl.simulation import Simulation, simulate


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    config.register()
    return run_application("simulate", _task, arguments)


def make_simulation(cfg: DictConfig) -> Simulation:
    """Build every object of a ``simulate`` configuration.

    Raises:
        ConfigurationError: naming the key, its value and the remedy.
    """
    data, extractor = build(cfg, "data"), build(cfg, "features")
    return Simulation(
        data=data if extractor is None else Features(data, extractor),
        partition=build(cfg, "partition"),
        model=build(cfg, "model"),
        optimizer=build(cfg, "optimizer"),
        selection=build(cfg, "selection"),
        privacy=build(cfg, "privacy"),
        protocol=build(cfg, "protocol"),
        merge=build(cfg, "merge"),
        criterion=build(cfg, "download.criterion"),
        participants=cfg.participants,
        rounds=cfg.rounds,
        round_length=cfg.round_length,
        batch_size=cfg.batch_size,
        bound=cfg.upload.bound,
        quantity=cfg.quantity,
        download_fraction=cfg.download.fraction,
        speed_spread=cfg.clock.speed_spread,
        drop_probability=cfg.clock.drop_probability,
        baselines=tuple(cfg.baselines),
        trainer=OmegaConf.to_container(cfg.trainer, resolve=True),  # type: ignore[arg-type]
        threads=cfg.threads,
        seed=cfg.seed,
    )


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.SimulateConfig)
    simulation = make_simulation(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    remove_report(directory)  # an interrupted run must not leave an older one's results as its own
    console = Console()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading data", total=simulation.work)
        results = simulate(simulation, lambda done, line: bar.update(task, advance=done, description=line))
    write_report(results, directory)
    console.print(closing_table(results))
    console.print(f"metrics.csv, summary.json and accuracy.png are in {directory}", soft_wrap=True)
