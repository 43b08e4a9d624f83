"""The ``ppdl`` command: each subcommand is a Hydra application."""

from __future__ import annotations

import difflib
import importlib
import sys

from lightning_ppdl import __version__

_COMMANDS = {
    "simulate": "many participants on one machine, from data to a picture of what they gain",
    "plan": "what a private run would cost and could learn, before it is run",
    "serve": "the parameter server, for participants on other machines",
    "join": "one participant of a collaboration, with its own data",
    "status": "what a running server is doing: members, turns, totals",
    "export": "the shared parameters of a running server, as a safetensors file",
    "keys": "certificates and tokens for trying out a server with TLS",
}


def main() -> int:
    """Run the subcommand that the command line names; the exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"ppdl {__version__}")
        return 0
    command = arguments[0]
    if command not in _COMMANDS:
        close = difflib.get_close_matches(command, _COMMANDS)
        hint = f"did you mean {close[0]!r}?" if close else "see ppdl --help"
        print(f"ppdl: there is no command {command!r}; {hint}", file=sys.stderr)
        return 2
    # Only now, and only that one: each brings libraries that the others do without.
    status: int = importlib.import_module(f"lightning_ppdl.cli.{command}").run(arguments[1:])
    return status


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {purpose}" for name, purpose in _COMMANDS.items())
    return (
        f"ppdl {__version__}: privacy-preserving deep learning with PyTorch Lightning\n\n"
        f"usage: ppdl COMMAND [KEY=VALUE ...] [hydra flags]\n\ncommands:\n{commands}\n\n"
        f"Every command is a Hydra application:\n"
        f"  ppdl simulate --help                       its groups and settings\n"
        f"  ppdl simulate experiment=digits            a finished collaboration in half a minute\n"
        f"  ppdl simulate selection.fraction=0.01      change a setting\n"
        f"  ppdl simulate --multirun seed=0,1,2        sweep\n"
        f"  ppdl simulate --cfg job                    show the configuration, run nothing\n"
        f"  ppdl plan privacy=record rounds=[10,100]   what privacy would cost\n"
        f"  ppdl serve address=0.0.0.0:50051           serve participants on other machines\n"
        f"  ppdl status grpc://127.0.0.1:50051         ask it how it is doing\n"
        f"  ppdl export grpc://127.0.0.1:50051 model.safetensors\n"
        f"  ppdl keys participants=[clinic-a,clinic-b] certificates and tokens for two"
    )
