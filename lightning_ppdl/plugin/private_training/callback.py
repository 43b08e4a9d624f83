"""Private optimizer steps inside a Trainer: the Lightning side of record-level privacy.

A Lightning closure computes gradients inside the optimizer's step, so whatever was noised before it would
be overwritten. Here the order is: closure (forward, backward), then clip, then noise, then the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.plugin.private_training.buffers import ConstantBuffers
from lightning_ppdl.plugin.private_training.conditions import check_start, check_trainer
from lightning_ppdl.plugin.private_training.trial import trial_loss
from lightning_ppdl.privacy.events import PrivateSteps, event_from_json
from lightning_ppdl.privacy.noise import NoiseAhead, NoiseSource
from lightning_ppdl.privacy.record.capture import Capture
from lightning_ppdl.privacy.record.checks import EXAMPLES, Reduction, Trial, check_layers, check_loss
from lightning_ppdl.privacy.record.clipping import ClippedSum, NoisyGradient
from lightning_ppdl.privacy.record.poisson import PoissonBatches, poisson_loader, require_plain_loader
from lightning_ppdl.privacy.record.record_level import PrivateStepsRelease, RecordLevel

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback as _Callback
    from pytorch_lightning.utilities.types import STEP_OUTPUT
else:
    _Callback = object


class PrivateTraining(_Callback):
    """Makes every optimizer step of a Trainer a private one.

    The strategy that owns it calls :meth:`process_dataloader` and :meth:`training_step` from its methods
    of these names, and :meth:`start` once the noise is settled. It must stand before the callbacks that
    send anything, and before those that read gradients.

    Per step: the Poisson sample of the step's batches, :meth:`Capture.begin`, the user's training step and
    backward, the clipped sum (``on_after_backward``), and when all parts of the sample are in, the noise
    (``on_before_optimizer_step``). ``gradient_clip_val`` acts after that, on what is private already.

    Every ``fit()`` begins with the tests of the loss, and from its first batch on no buffer may change: that
    is looked at twice a step, and by value once an epoch. What writes data into buffers before, or between
    two ``fit()``, is not seen.

    Args:
        mechanism: What the user asked for, calibrated or not.
        noise: Source of the noise and of the secret coins.
    """

    def __init__(self, mechanism: RecordLevel, noise: NoiseSource) -> None:
        self.mechanism = mechanism
        self._asked = mechanism
        self.records: int | None = None
        """n, once the Trainer has asked for its train loader."""
        self.batch_size: int | None = None
        """Of the user's train loader, before Poisson sampling took its place."""
        self._noise = noise
        self._fits = 0
        self._loader: DataLoader[Any] | None = None
        self._capture: Capture | None = None
        self._reduction: Reduction = "mean"
        self._release: PrivateStepsRelease | None = None
        self._clipped: ClippedSum | None = None
        self._gradient: NoisyGradient | None = None
        self._ahead: NoiseAhead | None = None
        self._buffers: ConstantBuffers | None = None
        self._examples: int | None = None
        self._carried: list[PrivateSteps] = []
        self._epoch_begins = False
        self._local = False

    # What the strategy calls ------------------------------------------------------------------------

    def process_dataloader(self, trainer: pl.Trainer, loader: object) -> object:
        """``loader``, or for the train loader one that draws Poisson samples."""
        # Validation loaders come the same way, later; the first to come in a fit() is the train loader.
        if trainer.state.fn != "fit" or not trainer.training or trainer.train_dataloader is not None:
            return loader
        if self._loader is not None:
            raise ConfigurationError(
                "there are several train loaders; privacy of records draws from one data set: concatenate "
                "them (torch.utils.data.ConcatDataset)"
            )
        plain = require_plain_loader(loader)
        self.records, self.batch_size = len(plain.dataset), plain.batch_size  # type: ignore[arg-type]
        # What the user asked for: the rate of an earlier fit() belongs to another loader.
        rate = self._asked.rate(self.batch_size, self.records)
        coins = self._noise.spawn("poisson", self._fits, trainer.global_step)
        self._loader = poisson_loader(plain, rate, coins, trainer.accumulate_grad_batches)
        rank_zero_info(
            f"privacy of records: the train loader's sampler is replaced by Poisson sampling, each of "
            f"{self.records} records with probability {rate:.4g} a step, "
            f"{len(self._loader) // trainer.accumulate_grad_batches} steps an epoch; batches vary in size"
        )
        return self._loader

    def start(self, mechanism: RecordLevel, release: PrivateStepsRelease) -> list[PrivateSteps]:
        """Begin: from here on steps are private, and counted by ``release``.

        Args:
            mechanism: Calibrated.
            release: Made by it.

        Returns:
            Steps of an earlier time that are in these parameters and in no ledger: to be paid for now, at
            what they cost then.
        """
        assert self.records is not None and self._loader is not None, "the Trainer has its train loader"
        sampler = self._loader.batch_sampler
        assert isinstance(sampler, PoissonBatches)
        if sampler.sampling_rate != release.step.sampling_rate:
            raise ConfigurationError(
                f"the train loader draws with rate {sampler.sampling_rate:.4g}, and it is accounted for "
                f"with {release.step.sampling_rate:.4g}; begin with a new strategy"
            )
        carried, self._carried = self._unpaid(), []
        self.mechanism, self._release, self._local = mechanism, release, False
        self._make_engine()
        return carried

    def go_local(self) -> None:
        """From here on train without clipping and noise; nothing of it may leave any more."""
        self._local = True

    def training_step(self, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's training step on this batch's records, if there are any.

        Args:
            step: The strategy's own ``training_step``.
        """
        examples, self._examples = self._examples, None
        if examples is None:
            raise ConfigurationError(
                "the optimizer evaluates its closure more than once a step, and each time would cost; take "
                "an optimizer that evaluates it once, such as SGD or Adam"
            )
        if examples == 0:
            # A loss without a graph: nothing to clip, and the step that follows is noise alone.
            return torch.zeros((), requires_grad=True)
        if self._local:
            return step(*args, **kwargs)
        capture = self._engine()
        capture.begin(examples)
        self._scale = float(examples) if self._reduction == "mean" else 1.0
        try:
            output = step(*args, **kwargs)
        except BaseException:
            capture.end()
            raise
        if output is None:
            capture.end()
            raise ConfigurationError(
                "training_step returned None: skipping a batch for what is in it tells of the records; "
                "return a loss for every batch"
            )
        return output

    # Hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._loader = None
        if stage == "fit":
            check_trainer(trainer, pl_module, self.mechanism.public_validation)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check all that can be checked: nothing has left yet."""
        self._fits += 1
        self._steps_before = trainer.global_step
        self._buffers = None
        check_layers(pl_module)
        self._renew_capture(pl_module)
        assert self._capture is not None
        check_start(trainer, self._capture.parameters, self.mechanism.public_validation)
        assert self._loader is not None
        exact = str(trainer.precision) in ("32-true", "64-true")
        with trial_loss(trainer, pl_module, self._loader, EXAMPLES) as (examples, loss):
            trial = Trial(pl_module, examples, loss, 1e-3 if exact else 5e-2)
            self._reduction = check_loss(self._capture, trial)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_begins = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not before: other callbacks thaw layers in on_train_epoch_start.
        if self._epoch_begins and not self._local:
            self._begin_epoch(pl_module)
        self._epoch_begins = False
        # Not before: the module's own on_train_start, and the tests of its loss, may write to buffers.
        if self._buffers is None:
            self._buffers = ConstantBuffers(pl_module)
        self._check_buffers()
        assert self._loader is not None
        sampler = self._loader.batch_sampler
        assert isinstance(sampler, PoissonBatches)
        self._examples = sampler.sizes.popleft()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._local or self._capture is None or self._clipped is None:
            return
        gradients = self._capture.end()
        if gradients:
            # Lightning divides the loss by the number of batches that one step accumulates.
            self._clipped.add(gradients, self._scale * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._local:
            return
        self._check_buffers()
        assert self._clipped is not None and self._gradient is not None and self._release is not None
        covered = set(self._engine().parameters.values())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in covered:
                    raise ConfigurationError(
                        "a parameter became trainable in the middle of an epoch, and has a gradient without "
                        "noise; unfreeze parameters between epochs"
                    )
        self._release.count_steps()
        self._gradient.write(self._clipped)
        self._clipped.reset()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.is_last_batch:
            self._check_buffers(by_value=True)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        return {"unpaid": [event.to_json() for event in self._unpaid()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Steps within a checkpoint are in what follows from it, whatever else was recorded since.
        for line in state_dict["unpaid"]:
            event = event_from_json(line)
            assert isinstance(event, PrivateSteps)
            self._carried.append(event)

    def _unpaid(self) -> list[PrivateSteps]:
        latest = None if self._release is None else self._release.unpaid()
        return [*self._carried, *([] if latest is None else [latest])]

    # ------------------------------------------------------------------------------------------------

    def _begin_epoch(self, pl_module: pl.LightningModule) -> None:
        check_layers(pl_module)
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if self._capture is None or not _same(trained, self._capture.parameters):
            self._renew_capture(pl_module)
            self._make_engine()
        assert self._clipped is not None
        self._clipped.reset()

    def _check_buffers(self, by_value: bool = False) -> None:
        if self._buffers is not None and not self._local:
            self._buffers.require_unchanged(by_value)

    def _engine(self) -> Capture:
        if self._capture is None or self._release is None:
            raise ConfigurationError(
                "PrivateTraining.start() was not called: the strategy must, before training"
            )
        return self._capture

    def _renew_capture(self, module: pl.LightningModule) -> None:
        if self._capture is not None:
            self._capture.remove()
        self._capture = Capture(module)

    def _make_engine(self) -> None:
        capture, mechanism = self._engine(), self.mechanism
        assert self._release is not None and self.records is not None
        if self._ahead is not None:
            self._ahead.close()
        parameters = list(capture.parameters.values())
        step = self._release.step
        size = sum(parameter.numel() for parameter in parameters)
        self._ahead = NoiseAhead(self._noise.spawn("steps", self._fits, self._steps_before, size), size)
        self._clipped = ClippedSum(parameters, mechanism.clip)
        self._gradient = NoisyGradient(
            parameters,
            step.noise_multiplier * step.clip,
            step.sampling_rate * self.records,
            self._ahead.gaussian,
        )

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._capture is not None:
            self._capture.remove()
        self._ahead = self._capture = self._clipped = self._gradient = self._buffers = None


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
