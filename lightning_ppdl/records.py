"""The records that travel between participant and server: frozen, named, and free of any framework.

Arrays are numpy and on the CPU, so that neither a server nor a transport needs torch to carry them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_ppdl.errors import FingerprintMismatchError

Vector = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Quantity = Literal["change", "gradient"]
ValueType = Literal["float32", "bfloat16", "float16"]


def entries(fraction: float, size: int) -> int:
    """How many of ``size`` entries a fraction allows: floor(theta * P), whoever counts.

    The tolerance undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    """
    return int(fraction * size + 1e-6)


@dataclass(frozen=True)
class ParameterSpec:
    """One shared tensor: its name in the module, its shape and its dtype (``"float32"``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What a participant declares when it joins; all that it uploads is held against it.

    Args:
        parameters: The shared tensors, in the order in which they lie in the flat vector.
        quantity: ``"change"``, the parameters' change over a round (the paper's delta_w), or
            ``"gradient"``, the sum of the round's gradients.
        upload_fraction: The most that a round uploads, as a fraction of all entries (theta_u).
        bound: Every uploaded value lies in [-bound, bound] (gamma); None for no bound.
    """

    parameters: tuple[ParameterSpec, ...]
    quantity: Quantity = "change"
    upload_fraction: float = 1.0
    bound: float | None = None

    @cached_property
    def size(self) -> int:
        """Number of shared entries, P."""
        return sum(spec.size for spec in self.parameters)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of names, shapes, dtypes and quantity: equal where vectors may be added."""
        content = json.dumps([[vars(spec) for spec in self.parameters], self.quantity])
        return hashlib.sha256(content.encode()).hexdigest()

    def to_primitives(self) -> dict[str, Any]:
        """Strings and numbers only, for :meth:`from_primitives`."""
        return asdict(self)

    @classmethod
    def from_primitives(cls, fields: dict[str, Any]) -> Manifest:
        """The manifest that :meth:`to_primitives` gave."""
        specs = tuple(
            ParameterSpec(spec["name"], tuple(spec["shape"]), spec["dtype"]) for spec in fields["parameters"]
        )
        return cls(**{**fields, "parameters": specs})

    def require_same_parameters(self, joining: Manifest, server: str) -> None:
        """Raise unless ``joining`` shares exactly the parameters that this manifest names.

        Raises:
            FingerprintMismatchError: naming the first parameter that differs.
        """
        if self.fingerprint == joining.fingerprint:
            return
        remedy = "Share the same parameters as the others, or join another collaboration"
        if server.startswith("memory:"):
            remedy += f"; lightning_ppdl.close({server!r}) ends this one"
        raise FingerprintMismatchError(
            f"this module cannot join {server!r}: {self._first_difference(joining)}. {remedy}"
        )

    def _first_difference(self, other: Manifest) -> str:
        if self.quantity != other.quantity:
            return f"it shares quantity={other.quantity!r}, the others share {self.quantity!r}"
        for position, (ours, theirs) in enumerate(zip(self.parameters, other.parameters)):
            if ours != theirs:
                return (
                    f"parameter {position} is {theirs.name!r} {list(theirs.shape)} {theirs.dtype} here, "
                    f"{ours.name!r} {list(ours.shape)} {ours.dtype} there"
                )
        longer, where = (self, "there") if len(self.parameters) > len(other.parameters) else (other, "here")
        extra = longer.parameters[min(len(self.parameters), len(other.parameters))]
        return f"parameter {extra.name!r} {list(extra.shape)} exists only {where}"


@dataclass(frozen=True)
class Membership:
    """The server's answer to a join.

    Args:
        session: Names the participant in its further requests, until it leaves or joins again. A secret.
        study: Identity of this collaboration; another one means that the server was made anew.
        version: Number of updates merged so far.
        last_round: The last round of this participant that was accepted, 0 if none.
        needs_initial: True while no parameters are there yet, and this participant may offer them.
        lease_seconds: How long a turn lasts without a sign of life.
        anytime: Whether nobody waits for a turn: then training may go on while an exchange does.
    """

    session: str
    study: str
    version: int
    last_round: int
    needs_initial: bool
    lease_seconds: float
    anytime: bool = False


@dataclass(frozen=True)
class DownloadRequest:
    """Ask for a fraction of the parameters.

    Args:
        fraction: theta_d, in (0, 1]; 1 asks for all of them.
        known_version: The version of the participant's last download, None if it has none. A
            request for all parameters with a known version promises that the participant still
            holds that version's whole vector, so that only what changed needs to be sent.
        dtype: How the values travel.
    """

    fraction: float
    known_version: int | None = None
    dtype: ValueType = "float32"


@dataclass(frozen=True)
class Download:
    """Parameters on their way to a participant.

    Args:
        version: The version they were read at.
        indices: int64 (k,), strictly increasing; None when ``values`` is the whole vector.
        values: float32 (k,) or (P,).
        complete: True when these values, over the version the participant already holds, are the
            whole vector; False when they are a chosen fraction and the rest stays local.
    """

    version: int
    indices: Indices | None
    values: Vector
    complete: bool


@dataclass(frozen=True)
class SparseUpdate:
    """What one round of one participant releases.

    Args:
        participant: Who uploads.
        round: Counts the participant's rounds from 1; each is merged at most once.
        base_version: The server version the round started from.
        indices: int64 (k,), strictly increasing.
        values: float32 (k,).
    """

    participant: str
    round: int
    base_version: int
    indices: Indices
    values: Vector


@dataclass(frozen=True)
class Receipt:
    """The server's word that a round was accepted.

    Args:
        round: The participant's round.
        version: The version that the merge made; under the synchronous protocol the one that it makes
            at the end of the cycle, if enough others upload.
        staleness: Updates of others merged between the round's download and its upload.
    """

    round: int
    version: int
    staleness: int


@dataclass(frozen=True)
class MemberStatus:
    """One participant as the server sees it: present or not, rounds accepted, seconds since heard."""

    name: str
    present: bool
    rounds: int
    idle_seconds: float


@dataclass(frozen=True)
class ServerStatus:
    """The server at a glance; holds no parameter value.

    Args:
        version: Merges so far.
        parameters: Entries of the shared vector, 0 before the first join.
        awaited: Whom those who wait for a turn are waiting for: whoever has it, or under the synchronous
            protocol all whose upload the cycle still lacks. Empty without turns.
        members: All that ever joined.
        uploads, uploaded_bytes, downloaded_bytes: Totals over accepted uploads and served downloads,
            in encoded bytes.
        rejections: Refused requests by error class name.
    """

    version: int
    parameters: int
    awaited: tuple[str, ...]
    members: tuple[MemberStatus, ...]
    uploads: int
    uploaded_bytes: int
    downloaded_bytes: int
    rejections: dict[str, int]
