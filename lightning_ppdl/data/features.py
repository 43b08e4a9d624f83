"""Another source's data, seen through a frozen extractor that is applied once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ppdl.data.dataset import ArrayDataset, DataSource, Splits
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.validation import require_count


@dataclass(frozen=True)
class Features:
    """What ``extractor`` makes of the inputs of ``source``, computed when it is loaded.

    Training then sees the features alone: the extractor is no part of the model, is never trained,
    and costs nothing a round. Under differential privacy that is most of what can be done for
    accuracy, since noise is added to the few parameters that remain.

    Guarantee: a feature depends on its own example and on the extractor. An extractor that was made
    without the private data therefore needs no privacy budget. Whether it was, only you know.

    Edge cases: a split without rows keeps none; an extractor in training mode is switched to evaluation
    while it is used; one whose features of an example change with the other examples of a batch (batch
    statistics), or from call to call (dropout), or are not finite, is refused.

    Args:
        source: Where the inputs come from.
        extractor: From inputs, float32 (batch, *input_shape), to features (batch, *shape). A module is
            given its inputs on its own device.
        batch_size: Inputs that the extractor gets at once.

    Raises:
        ConfigurationError: For an extractor that can't be called; on loading, for one that fails the
            rules above.

    >>> from lightning_ppdl.data import Digits
    >>> Features(Digits(), lambda images: images.flatten(1) - 0.5).load().input_shape
    (64,)
    """

    source: DataSource
    extractor: Callable[[Tensor], Tensor]
    batch_size: int = 100

    def __post_init__(self) -> None:
        require_count("features.batch_size", self.batch_size)
        if not callable(self.extractor):
            raise ConfigurationError(
                f"features.extractor={self.extractor!r} must be a function or module from a batch of "
                "inputs to a batch of features"
            )

    def load(self) -> Splits:
        """Load the source and compute all features: float32, held in memory."""
        splits = self.source.load()
        module = self.extractor if isinstance(self.extractor, nn.Module) else nn.Identity()
        training = [part for part in module.modules() if part.training]
        module.eval()
        try:
            with torch.no_grad():
                train, test = self._features(splits.train), self._features(splits.test)
        finally:
            for part in training:
                part.training = True
        return Splits(train, test, input_shape=train.input_shape, classes=splits.classes)

    def _features(self, inputs: ArrayDataset) -> ArrayDataset:
        rows = len(inputs)
        probe = self._extract(inputs, range(min(2, rows)))
        features = torch.empty(rows, *probe.shape[1:])
        for start in range(0, rows, self.batch_size):
            batch = range(start, min(start + self.batch_size, rows))
            features[batch.start : batch.stop] = self._extract(inputs, batch)
        for row in range(len(probe)):
            # Compared with what it was in company, up to rounding, which differs with the batch's size.
            alone = self._extract(inputs, range(row, row + 1))[0]
            for other in (features[row], probe[row]):
                if not torch.allclose(alone, other, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
                    raise ConfigurationError(
                        "features.extractor gives an example other features when other examples are in the "
                        "batch, or when it is called again; give one that looks at single examples, without "
                        "batch statistics and randomness"
                    )
        return ArrayDataset(features, inputs.labels)

    def _extract(self, inputs: ArrayDataset, rows: range) -> Tensor:
        images, _ = inputs.__getitems__(rows)
        if isinstance(self.extractor, nn.Module):
            state = [*self.extractor.parameters(), *self.extractor.buffers()]
            images = images.to(state[0].device) if state else images
        features = self.extractor(images)
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(rows):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigurationError(
                f"features.extractor made {shape} of inputs of shape {tuple(images.shape)}; "
                f"it must give a tensor of shape ({len(rows)}, ...), one row for each input"
            )
        features = features.to("cpu", torch.float32)
        if not features.isfinite().all():
            raise ConfigurationError(
                f"features.extractor gives values that aren't finite for rows {rows.start} to {rows.stop - 1}"
            )
        return features
