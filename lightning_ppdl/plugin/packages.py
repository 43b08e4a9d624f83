"""Lightning comes as two packages, which accept none of each other's objects."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

# Where the classes for either of them are imported from.
_HOMES = {"pytorch_lightning": "lightning_ppdl", "lightning.pytorch": "lightning_ppdl.lightning"}


def package_name(part: object) -> str:
    """``"pytorch_lightning"`` or ``"lightning.pytorch"``: whichever ``part`` is an object of.

    Args:
        part: A Trainer, a LightningModule, a strategy or a callback, of a user's own class or Lightning's.
    """
    for kind in type(part).__mro__:
        for name in _HOMES:
            if kind.__module__ == name or kind.__module__.startswith(f"{name}."):
                return name
    raise TypeError(f"{type(part).__name__} is of neither of Lightning's packages")


def package_of(part: object) -> ModuleType:
    """The package that ``part`` is an object of."""
    return sys.modules[package_name(part)]


def mismatch(part: object) -> str:
    """What to say of ``part``, a class of ours, where it meets the other package's Trainer."""
    own, name = package_name(part), type(part).__name__
    other = next(package for package in _HOMES if package != own)
    return f"{_HOMES[own]}.{name} is for a {own}.Trainer; for a {other}.Trainer take {_HOMES[other]}.{name}"


def callbacks_of(trainer: Any, *names: str) -> list[Any]:
    """The Trainer's callbacks of the classes with these ``names`` in its package's ``callbacks``."""
    classes = tuple(getattr(package_of(trainer).callbacks, name) for name in names)
    return [callback for callback in trainer.callbacks if isinstance(callback, classes)]
