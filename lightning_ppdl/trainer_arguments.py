"""Arguments of Lightning's Trainer on the command line: which there are, and who decides some of them."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import pytorch_lightning as pl

_DECIDED_BY = {
    "max_epochs": "rounds",
    "min_epochs": "rounds",
    "max_steps": "rounds and round_length",
    "min_steps": "rounds and round_length",
    "max_time": "rounds",
    "strategy": "the command",
    "callbacks": "the command",
}


def trainer_argument_problem(name: str, value: Any) -> str | None:
    """Why ``Trainer(name=value)`` cannot be asked for where a command makes the Trainer; None if it can."""
    if name in _DECIDED_BY:
        return f"trainer.{name}={value!r} cannot be set: {_DECIDED_BY[name]} decides it"
    taken = inspect.signature(pl.Trainer.__init__).parameters
    if name in taken:
        return None
    close = difflib.get_close_matches(name, taken, n=1)
    hint = f"did you mean trainer.{close[0]}?" if close else "see Lightning's documentation for those it has"
    return f"trainer.{name}={value!r}: Lightning's Trainer has no such argument; {hint}"
