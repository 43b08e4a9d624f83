"""The few checks that most constructors share: each names the argument, its value and the range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal, TypeVar

from lightning_ppdl.errors import ConfigurationError

Choice = TypeVar("Choice")


def require_fraction(name: str, value: float) -> float:
    """Return ``value`` if it is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ConfigurationError(f"{name}={value!r} must be a number in (0, 1], e.g. {name}=0.1")
    return float(value)


def require_positive(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name}={value!r} must be a finite number above 0")
    return float(value)


def require_not_negative(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number, zero or more."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ConfigurationError(f"{name}={value!r} must be a finite number, 0 or more")
    return float(value)


def require_count(name: str, value: int) -> int:
    """Return ``value`` if it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ConfigurationError(f"{name}={value!r} must be a whole number, 1 or more")
    return int(value)


def require_choice(name: str, value: Choice, choices: Sequence[str]) -> Choice:
    """Return ``value`` if it is one of ``choices``, at least two."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ConfigurationError(f"{name}={value!r} must be {', '.join(others)} or {last}")
    return value


def require_name(name: str, value: str) -> str:
    """Return ``value`` if it is a string of 1 to 255 printable characters."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 255:
        raise ConfigurationError(
            f"{name}={value!r} must be a name of 1 to 255 printable characters, e.g. {name}='clinic-a'"
        )
    return value


def require_round_length(value: int | Literal["epoch"]) -> int | Literal["epoch"]:
    """Return ``value`` if it is ``"epoch"`` or a whole number of optimizer steps, 1 or more."""
    if value != "epoch" and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise ConfigurationError(
            f"round_length={value!r} must be 'epoch' or a number of optimizer steps, 1 or more"
        )
    return value
