"""Clipped sums of per-example gradients, and the noised gradient made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_ppdl.privacy.noise import Floats
from lightning_ppdl.privacy.record.capture import accumulation_dtype
from lightning_ppdl.privacy.record.gradients import PerExample
from lightning_ppdl.validation import require_positive

# Norms in float32 are short of the true ones by less than this share.
_MARGIN = 1e-5
_ROUNDER = 1.5 * 2.0**52 * 2.0**-20


def clip_weights(squared_norms: Tensor, clip: float, scale: float = 1.0) -> Tensor:
    """What each gradient is multiplied by: ``scale``, or less, so that its norm is at most ``clip``.

    Args:
        squared_norms: (b,): of the whole gradients, over all parameters jointly.
        clip: C.
        scale: Factor that is missing in the gradients: the loss was divided by it.

    Returns:
        (b,). Edge cases: a zero gradient keeps weight ``scale``; gradients that are not finite are the
        caller's to remove, since 0 x NaN is NaN.
    """
    return squared_norms.rsqrt().mul_(clip * (1 - _MARGIN)).clamp_(max=scale)


class ClippedSum:
    """The sum of clipped per-example gradients, over the micro-batches of one step.

    Guarantee: one more or one fewer record among the examples changes the sum by at most ``clip`` in L2
    (up to float rounding), whatever the record is.

    Args:
        parameters: All trainable ones: one norm an example, over them jointly.
        clip: C, above 0.

    =================================================================  =====================
    no example                                                         adds nothing
    an example's gradient is zero                                      adds zero
    its norm is below the clip                                         added as it is
    its gradient holds NaN or infinity, or its squared norm overflows  adds zero
    a parameter took no part                                           its entries stay zero
    =================================================================  =====================
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip: float) -> None:
        self.clip = require_positive("clip", clip)
        sizes = [parameter.numel() for parameter in parameters]
        dtype, device = accumulation_dtype(parameters), parameters[0].device
        self.total = torch.zeros(sum(sizes), dtype=dtype, device=device)
        """(P,): the sum so far."""
        self._parts = torch.split(self.total, sizes)

    def reset(self) -> None:
        """Start over, for the next step."""
        self.total.zero_()

    @torch.no_grad()
    def add(self, gradients: Mapping[int, PerExample], scale: float = 1.0) -> None:
        """Clip a micro-batch's gradients and add them.

        Args:
            gradients: By position in ``parameters``.
            scale: What the loss was divided by: the batch size for a mean, 1 for a sum.
        """
        if not gradients:
            return
        squares = [of_parameter.squared_norms() for of_parameter in gradients.values()]
        squared_norms = torch.stack(squares).sum(0) if len(squares) > 1 else squares[0]
        weights = clip_weights(squared_norms, self.clip, scale)
        # A sum is finite only if its terms are.
        if not math.isfinite(squared_norms.sum()):
            bad = ~squared_norms.isfinite()
            weights.masked_fill_(bad, 0.0)
            gradients = {position: g.without(bad) for position, g in gradients.items()}
        for position, of_parameter in gradients.items():
            of_parameter.add_weighted_sum(self._parts[position], weights)


class NoisyGradient:
    """Writes (clipped sum + noise) / expected batch size into every parameter's ``grad``.

    The sum in double precision is rounded to a public grid, 2**-20 of the noise's deviation, before it
    becomes float32: its last bits would tell of the sum (Mironov, CCS 2012).

    Args:
        parameters: The ones of the sum, in its order.
        deviation: sigma C: the noise's standard deviation.
        expected_batch_size: q n, a constant: the realised size of a Poisson sample is secret.
        draw: Returns fresh standard normal noise, float64 (P,), which is overwritten.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        deviation: float,
        expected_batch_size: float,
        draw: Callable[[], Floats],
    ) -> None:
        self._deviation = require_positive("deviation", deviation)
        self._factor = self._deviation / require_positive("expected_batch_size", expected_batch_size)
        self._draw = draw
        sizes = [parameter.numel() for parameter in parameters]
        dtype, device = accumulation_dtype(parameters), parameters[0].device
        self._noisy = torch.empty(sum(sizes), dtype=dtype, device=device)
        parts = torch.split(self._noisy, sizes)
        self._parts = [(p, part.view_as(p)) for part, p in zip(parts, parameters, strict=True)]

    @torch.no_grad()
    def write(self, clipped: ClippedSum) -> None:
        """Set the gradients from the step's sum. What they held before is dropped."""
        noise = torch.from_numpy(self._draw()).to(clipped.total.device)
        noise.add_(clipped.total, alpha=1 / self._deviation)
        # In float64 there is no room for digits below the grid beside this number.
        noise.add_(_ROUNDER).sub_(_ROUNDER)
        torch.mul(noise, self._factor, out=self._noisy)
        for parameter, part in self._parts:
            # Its own dtype, or autograd's next gradient could not take its place.
            parameter.grad = part if part.dtype == parameter.dtype else part.to(parameter.dtype)
