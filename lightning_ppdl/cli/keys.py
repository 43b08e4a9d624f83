"""``ppdl keys``: a demo certificate authority, certificates for server and participants, and tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lightning_ppdl import config
from lightning_ppdl.cli.application import refuse_unknown, run_application

if TYPE_CHECKING:
    from lightning_ppdl.keys import Keys


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hosts", "participants") and value and value[0] not in "[$":
            # Hydra would say that a str is no ListConfig.
            print(f"ppdl keys: {argument}: this setting is a list; write {key}=[{value}]", file=sys.stderr)
            return 2
    config.register()
    return run_application("keys", _task, arguments)


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.KeysConfig)
    from lightning_ppdl.keys import make_keys  # here, so that --help needs no cryptography

    keys = make_keys(cfg.directory, list(cfg.hosts), list(cfg.participants), cfg.days)
    print("\n".join(_lines(keys, list(cfg.participants))))


def _lines(keys: Keys, participants: Sequence[str]) -> list[str]:
    where = str(keys.directory)
    lines = []
    if keys.kept:
        lines.append(f"kept in {where}: {' '.join(keys.kept)}")
    lines.append(f"made in {where}: {' '.join(keys.made) or 'nothing, all were there'}")
    lines += [f"note: {note}" for note in keys.notes]
    lines.append("")
    lines.append("the server gets     ca.pem server.pem server-key.pem tokens.txt")
    for name in participants:
        lines.append(f"{name} gets".ljust(20) + f"ca.pem {name}.pem {name}-key.pem {name}.token")
    if not participants:
        lines.append("participants        none named: add them with participants=[clinic-a,clinic-b]")
    lines += [
        "nobody gets         ca-key.pem: it can make a certificate in any name; keep it offline",
        "",
        "This authority is for demonstrations: in production use your organisation's own.",
    ]
    return lines
