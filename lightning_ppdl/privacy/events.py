"""What a private release costs, described so fully that anybody can account for it later.

Events are frozen and say what was done, never what it amounts to: that is the accountant's affair.
"""

from __future__ import annotations

import json
from abc import ABC
from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar, Literal

from lightning_ppdl.errors import ConfigurationError

Unit = Literal["participant", "record"]
"""Whose presence is hidden: all data of a participant, or one record of it."""

_KINDS: dict[str, type[PrivacyEvent]] = {}
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
}
"""What JSON makes of the fields' types."""


@dataclass(frozen=True)
class PrivacyEvent(ABC):
    """One kind of private release and its parameters. Equal events compose as repetitions of one."""

    kind: ClassVar[str]
    """Name in stored ledgers; never changes."""
    unit: ClassVar[Unit]
    neighbours: ClassVar[str]
    """The neighbouring relation, as it is printed beside every epsilon."""

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    def to_json(self) -> str:
        """The event as one line of JSON; :func:`event_from_json` reads it back."""
        return json.dumps({"kind": self.kind, **asdict(self)}, sort_keys=True)


@dataclass(frozen=True)
class SparseVectorRound(PrivacyEvent):
    """One round of the sparse vector mechanism: pure ``epsilon``-differential privacy.

    Args:
        epsilon: Of the whole round, charged in full whatever is released.
        uploads: c, the most entries the round releases.
        size: P, the entries asked.
        bound: gamma.
        threshold: tau.
        variant: ``"paper"`` or ``"standard"``.
        exact: Whether the noise came from the exact, discrete samplers.
        value_share: Share of epsilon spent on the released values, where the variant leaves that open.
    """

    kind = "sparse_vector"
    unit = "participant"
    neighbours = "any change of one participant's whole data set"

    epsilon: float
    uploads: int
    size: int
    bound: float
    threshold: float
    variant: str
    exact: bool = False
    value_share: float | None = None


@dataclass(frozen=True)
class GaussianRound(PrivacyEvent):
    """One round's update, clipped in L2 and released with Gaussian noise.

    Args:
        noise_multiplier: sigma: the noise's standard deviation over the sensitivity under removal of
            the participant's data.
        clip: C, the L2 norm that the update is clipped to.
        size: Entries that were noised.
        exact: Whether the noise came from the exact, discrete sampler.
    """

    kind = "gaussian"
    unit = "participant"
    neighbours = "presence or absence of one participant's whole data set (zero-out)"

    noise_multiplier: float
    clip: float
    size: int
    exact: bool = False


@dataclass(frozen=True)
class PrivateSteps(PrivacyEvent):
    """Steps of DP-SGD: Poisson samples of records, clipped gradients, Gaussian noise.

    Args:
        noise_multiplier: sigma: the noise's standard deviation over ``clip``.
        sampling_rate: q: the probability with which each record is drawn, independently, a step.
        clip: C, the L2 norm that each record's gradient is clipped to.
        steps: Number of such steps.
        exact: Whether the noise came from the exact, discrete sampler.
    """

    kind = "dp_sgd"
    unit = "record"
    neighbours = "presence or absence of one record (add/remove)"

    noise_multiplier: float
    sampling_rate: float
    clip: float
    steps: int
    exact: bool = False


def event_from_json(line: str) -> PrivacyEvent:
    """The event that :meth:`PrivacyEvent.to_json` wrote.

    Raises:
        ConfigurationError: for a kind of event that this version does not know, since accounting must not
            pass over it, and for fields that are missing, unknown or of another type.
    """
    try:
        values = json.loads(line)
        kind = values.pop("kind")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigurationError(f"{line!r} describes no private release: {error!r}") from error
    if kind not in _KINDS:
        raise ConfigurationError(
            f"the ledger holds a {kind!r} event, which this version of lightning_ppdl cannot account for; "
            f"use the version that wrote it"
        )
    wanted = {field.name: field for field in fields(_KINDS[kind])}
    wrong = [f"{name} is unknown" for name in values if name not in wanted]
    for name, field in wanted.items():
        if name not in values:
            wrong += [f"{name} is missing"] if field.default is MISSING else []
        elif type(values[name]) not in _TYPES[str(field.type)]:
            wrong.append(f"{name}={values[name]!r} is no {field.type}")
    if wrong:
        raise ConfigurationError(f"{line!r} describes no {kind!r} event: {', '.join(wrong)}")
    return _KINDS[kind](**values)
