"""What was not sent is not forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import ParameterSpec
from lightning_ppdl.selection.base import Selection, checked_indices, require_selection
from lightning_ppdl.selection.largest import LargestValues


@dataclass(frozen=True)
class ErrorFeedback(Selection):
    """Another selection, with a memory: what is not sent of an update is kept, and added to the next one.

    What is kept, the residual, is one participant's: it is with its release
    (:class:`~lightning_ppdl.privacy.release.PlainRelease`) and in its checkpoints. In each round it is
    added to the update, the inner selection chooses from the sum, and what is left of the sum stays due:
    the entries that were not chosen, what the bound cut off, and what rounding for the way took. So the
    residual and all that was sent add up to all updates.

    An update that is known not to have been merged (the turn's lease ran out, the cycle was closed, the
    upload got lost) is due again; one that was not answered is sent again anyway, and is not. Rounds trained
    alone change nothing. Where it is not known what was sent, as the server has later rounds than the
    checkpoint, or is another one, the residual is dropped: rather nothing of it than a part of it twice.

    The server's parameters lack the residual, and gradients taken there point once more to where it leads.
    So local training starts part of the way ahead: at the downloaded parameters plus ``ahead`` times the
    residual. Entries that were not downloaded (theta_d < 1) still have what was not sent, and stay as they
    are.

    With ``quantity="gradient"`` the residual is a sum of gradients that the server has yet to apply, and
    ``ahead`` plays no part: it is no distance between parameters.

    **Privacy.** It protects nothing. Beside :class:`~lightning_ppdl.RecordLevel` it is sound: updates are
    made of steps that were noised and paid for, so the residual, where training starts and all that is ever
    sent follow from private values. Beside :class:`~lightning_ppdl.ParticipantLevel` and
    :class:`~lightning_ppdl.SparseVector` it is refused: there noise comes after, the residual would be
    un-noised, and would carry one round's data into later releases. (It would be within their bounds if they
    added it before they clip; they do not.)

    Args:
        selection: What chooses from the sum; any but another error feedback.
        ahead: lambda, in [0, 1]: how far ahead local training starts; 0 is the classic form. The default was
            chosen on images that no participant held (benchmarks/error_feedback.py), where participants take
            turns; under the synchronous protocol, where the mean of many updates is merged, 0 does better.

    ====================  ========================================================================
    zero update           entries are chosen from the residual alone
    fraction 1            without a bound, and in float32, nothing is ever due
    a small bound         what is far beyond it leaves in instalments, over many rounds
    NaN or infinity       the update is refused as ever; the residual stays as it was
    ties, no entries      as the inner selection has it, for the sum
    ====================  ========================================================================

    Sources: F. Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; S. Stich et al.,
    "Sparsified SGD with Memory", NeurIPS 2018, algorithm 1; Y. Lin et al., "Deep Gradient Compression", ICLR
    2018 (without its parts on momentum). Starting ahead: A. Xu et al., "Step-Ahead Error Feedback for
    Distributed Training with Compressed Gradient", AAAI 2021; part of the way: A. Xu and H. Huang, "Detached
    Error Feedback for Distributed SGD with Random Sparsification", ICML 2022.
    """

    selection: Selection = field(default_factory=LargestValues)
    ahead: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(require_selection(self.selection), ErrorFeedback):
            raise ConfigurationError(
                f"selection={self.selection!r} within ErrorFeedback: what is not sent is kept once; give the "
                f"selection that is inside"
            )
        ahead = self.ahead
        if isinstance(ahead, bool) or not isinstance(ahead, Real) or not 0 <= ahead <= 1:
            raise ConfigurationError(f"ahead={ahead!r} must be a number in [0, 1], e.g. ahead=0.5")

    @property
    def fraction(self) -> float:  # type: ignore[override]
        """theta_u: the inner selection's."""
        return self.selection.fraction

    @property
    def looks_at_data(self) -> bool:  # type: ignore[override]
        """As the inner selection: which entries a mask chooses depends on no residual either."""
        return self.selection.looks_at_data

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return checked_indices(self.selection, delta, generator)

    def count(self, size: int) -> int:
        return self.selection.count(size)

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> Selection:
        return replace(self, selection=self.selection.for_tensors(specs))
