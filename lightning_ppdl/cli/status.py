"""``ppdl status``: a running server at a glance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lightning_ppdl import config
from lightning_ppdl.cli.application import refuse_unknown, run_application
from lightning_ppdl.cli.remote import answer_of, make_backend, with_keys
from lightning_ppdl.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_ppdl.records import ServerStatus


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    config.register()
    return run_application("status", _task, with_keys(arguments, ["server"]))


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.StatusConfig)
    backend = make_backend(cfg, "ppdl status")
    status = answer_of(backend.status, backend)
    if cfg.json:
        print(json.dumps(asdict(status)))
    else:
        _show(status, backend.url)


def _show(status: ServerStatus, url: str) -> None:
    from lightning_ppdl.server.observe.words import ago, count, reason, size

    console, table = _console_and_table()
    for member in status.members:
        table.add_row(
            member.name,
            "present" if member.present else "away",
            f"{member.rounds:,}",
            ago(member.idle_seconds),
            "awaited" if member.name in status.awaited else "",
        )
    lines = [
        f"{url}: version {status.version:,}, {count(status.parameters, 'shared parameter')}",
        f"waiting for {', '.join(status.awaited)}" if status.awaited else "waiting for nobody",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if status.members:
        console.print(table)
    else:
        console.print("nobody has joined yet")
    refused = "; ".join(f"{number:,} {reason(name)}" for name, number in status.rejections.items())
    lines = [
        f"{count(status.uploads, 'upload')} ({size(status.uploaded_bytes)}), downloads of "
        f"{size(status.downloaded_bytes)}",
        f"refused requests: {refused or 'none'}",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _console_and_table() -> tuple[Any, Any]:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ConfigurationError(
            "the table needs the package rich: pip install 'lightning_ppdl[simulate]', or ask for json=true"
        ) from error
    # Names are shown as they are: markup in them is none.
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    table = Table("participant", "state")
    table.add_column("rounds", justify="right")
    table.add_column("last heard", justify="right")
    table.add_column("")
    return console, table
