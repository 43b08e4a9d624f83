"""Test accuracy, outside any Trainer: of a module, or of a flat vector put into one."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_ppdl.data import ArrayDataset, loader
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.models import Classifier

_BATCH = 1000


class Evaluator:
    """Measures classifiers on one test set, and keeps the time that takes apart from the training's.

    Args:
        module: A classifier of its own, into which vectors are put.
        test: The test set.
        classes: Number of classes.
    """

    def __init__(self, module: Classifier, test: ArrayDataset, classes: int) -> None:
        self._module = module
        self._layout = ParameterLayout(module)
        self._test = test
        self._classes = classes
        self.seconds = 0.0
        """Wall clock spent in evaluations so far."""

    def of_vector(self, vector: Tensor, buffers: Classifier) -> float:
        """Accuracy in [0, 1] of the parameters ``vector``, float32 (P,).

        Buffers (batch normalisation's statistics) are no part of the vector: those of the module
        ``buffers`` are used.
        """
        for own, trained in zip(self._module.buffers(), buffers.buffers(), strict=True):
            own.copy_(trained)
        self._layout.assign(vector)
        return self.of_module(self._module)

    def of_module(self, module: Classifier) -> float:
        """Accuracy in [0, 1] of ``module``, whose mode (train or eval) is left as it was."""
        started = time.perf_counter()
        was_training = module.training
        module.eval()
        with torch.no_grad():
            outputs = [
                (module(inputs.to(module.device)).argmax(1), labels)
                for inputs, labels in loader(self._test, _BATCH)
            ]
        module.train(was_training)
        predicted = torch.cat([output.cpu() for output, _ in outputs])
        labels = torch.cat([label for _, label in outputs])
        accuracy = multiclass_accuracy(predicted, labels, self._classes, average="micro")
        self.seconds += time.perf_counter() - started
        return float(accuracy)
