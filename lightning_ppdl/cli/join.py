"""``ppdl join``: from a configuration to one participant of a collaboration elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_ppdl import config
from lightning_ppdl.cli.application import build, quiet_grpc, refuse_unknown, run_application
from lightning_ppdl.cli.remote import server_address
from lightning_ppdl.errors import ConfigurationError


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    config.register()
    quiet_grpc()
    return run_application("join", _task, arguments)


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.JoinConfig)
    for name in ("server", "participant"):
        if OmegaConf.is_missing(cfg, name):
            example = {"server": "grpc://localhost:50051", "participant": "clinic-a"}[name]
            raise ConfigurationError(f"{name} is missing: give {name}={example}, say")
    if re.search(r"[/\\]|^\.", cfg.participant) and cfg.participant in f"{cfg.directory} {cfg.ledger}":
        raise ConfigurationError(
            f"participant={cfg.participant!r} cannot be part of a file's name: give a directory and a ledger"
        )
    from lightning_ppdl.participation import Participation, device_count
    from lightning_ppdl.trainer_arguments import trainer_argument_problem

    trainer: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    for name, value in trainer.items():
        if problem := trainer_argument_problem(name, value):
            raise ConfigurationError(problem)
    data, extractor = build(cfg, "data"), build(cfg, "features")
    if extractor is not None:
        from lightning_ppdl.data import Features

        data = Features(data, extractor)
    participation = Participation(
        strategy=_strategy(cfg, several=device_count(trainer) > 1),
        data=data,
        partition=build(cfg, "partition"),
        model=build(cfg, "model"),
        optimizer=build(cfg, "optimizer"),
        participants=cfg.participants,
        share=cfg.share,
        rounds=cfg.rounds,
        batch_size=cfg.batch_size,
        directory=Path(cfg.directory),
        trainer=trainer,
        threads=cfg.threads,
        seed=cfg.seed,
    )
    results = participation.run()
    if results is None:
        return
    shared = f"shared {results.rounds} rounds, {results.merged} of them merged"
    if not results.rounds:
        shared = f"had shared its {cfg.rounds} rounds before (raise rounds, or give another directory)"
    print(f"{cfg.participant}: {shared}; test accuracy {results.accuracy:.1%}. The model is {results.model}")


def _strategy(cfg: DictConfig, several: bool) -> Any:
    from lightning_ppdl.pytorch_lightning import DSSGDDDPStrategy, DSSGDStrategy

    privacy = build(cfg, "privacy")
    return (DSSGDDDPStrategy if several else DSSGDStrategy)(
        server=server_address(cfg),
        participant=cfg.participant,
        selection=build(cfg, "selection"),
        bound=cfg.upload.bound,
        privacy=privacy,
        ledger=None if privacy is None else cfg.ledger,
        download_fraction=cfg.download.fraction,
        round_length=cfg.round_length,
        quantity=cfg.quantity,
        initial=cfg.initial,
        seed=cfg.seed,
        turn_timeout_seconds=cfg.turn_timeout_seconds,
        on_unreachable=cfg.on_unreachable,
        unreachable_seconds=cfg.unreachable_seconds,
        transfer_dtype=cfg.transfer_dtype,
        overlap_steps=cfg.overlap_steps,
    )
