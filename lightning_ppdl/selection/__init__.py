"""Which entries of an update leave the participant (paper, section 5.2).

A selection looks at the update's values, so *which* indices are uploaded tells something about the
data too; see ``docs/`` on what sharing fewer values does and does not protect.
"""

from __future__ import annotations

from lightning_ppdl.selection.base import Selection, require_entries, require_selection
from lightning_ppdl.selection.error_feedback import ErrorFeedback
from lightning_ppdl.selection.largest import LargestValues
from lightning_ppdl.selection.per_layer import PerLayer
from lightning_ppdl.selection.random_samples import RandomAboveThreshold, RandomFraction

__all__ = [
    "ErrorFeedback",
    "LargestValues",
    "PerLayer",
    "RandomAboveThreshold",
    "RandomFraction",
    "Selection",
    "default_selection",
    "require_entries",
    "require_selection",
]


def default_selection(fraction: float | None = None) -> Selection | None:
    """``LargestValues(fraction)``, or None, which leaves the choice to the strategy and its mechanism."""
    return None if fraction is None else LargestValues(fraction)
