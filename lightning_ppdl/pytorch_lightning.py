"""The strategies and callbacks for ``pytorch_lightning``; for ``lightning.pytorch`` see ``lightning.py``."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_ppdl.plugin import private_training
from lightning_ppdl.plugin.rounds import Rounds
from lightning_ppdl.plugin.strategy import OneDevice, SeveralDevices


class DSSGDCallback(Rounds, pl.Callback):
    """Opens a round before its first batch and closes it after its last one.

    :class:`~lightning_ppdl.DSSGDStrategy` attaches one if the user has not. A round begins (turn,
    download) at ``on_train_batch_start`` and ends (release, upload) at ``on_train_batch_end``, before
    validation and checkpoints; so both see the participant's own parameters after local training. An
    epoch that is cut short ends its round at ``on_train_epoch_end``.

    A round for which the server cannot be reached may be trained alone; what it waits for, and for how
    long, is written above the progress bar.

    After each round it logs, as ``ppdl/...`` to every logger and in part to the progress bar, ``alone`` (1
    for such a round, else 0) and, of a round that was shared, the fields of
    :class:`~lightning_ppdl.round_report.RoundReport`, whatever ``log_every_n_steps`` is; under a privacy
    mechanism also ``epsilon``, the ledger's total, and ``epsilon_remaining``.

    Where the next round, or the next private step, would bring the ledger's total beyond the budget,
    training stops, or goes on alone: as the mechanism's ``on_exhausted`` says.

    Attributes:
        reports: One report a round, of this process.
    """


class PrivateTraining(private_training.PrivateTraining, pl.Callback):
    """What makes the steps of a ``pytorch_lightning.Trainer`` private."""


class DSSGDStrategy(OneDevice, SingleDeviceStrategy):
    """Distributed selective SGD on one device: ``Trainer(strategy=DSSGDStrategy(...))``.

    Before each round the parameters are downloaded, after it the selected part of their change is
    uploaded; in between the Trainer trains as it always does. One ``fit()`` is the whole run, and a
    further ``fit()`` of the same module goes on with the same optimizers and schedulers.

    Args:
        server: Address of the parameter server, e.g. ``"memory://study"``, or a :class:`Backend`.
            None reads it from the environment variable ``PPDL_SERVER``.
        participant: This participant's name at the server. None reads it from ``PPDL_PARTICIPANT``.
        selection: Which entries of an update are uploaded; the largest tenth by default.
        bound: gamma: every uploaded value is clamped into [-bound, bound]; None for no bound.
        privacy: How releases are made differentially private: a
            :class:`~lightning_ppdl.privacy.mechanism.Mechanism`. None adds no noise and makes no claim.
        ledger: Where private releases are entered: the path of this data set's ledger, one for all runs
            and servers. None reads it from ``PPDL_LEDGER``. Only with ``privacy``.
        noise: Where noise and secret coins come from; None for the operating system's cryptographic
            source. A seeded one is for simulations.
        download_fraction: theta_d in (0, 1]: the share of the parameters downloaded before a round.
        round_length: ``"epoch"``, or a number of optimizer steps.
        quantity: ``"change"``: the change of the parameters over the round. ``"gradient"``: the sum
            of its gradients, unscaled and before clipping, for a server with an optimizer of its own.
        share: Which trainable parameters are shared: None for all, name patterns, or a predicate; see
            :class:`~lightning_ppdl.layout.ParameterLayout`.
        share_buffers: Name patterns of buffers to share too; by default buffers stay local.
        initial: What a server without parameters starts from: a public seed (an int), a
            ``.safetensors`` file, or ``"own"``, this module's parameters, which leave un-noised.
        seed: Of this participant's random selections.
        turn_timeout_seconds: The longest it waits for its turn.
        on_unreachable: What to do while the server cannot be reached: ``"wait"`` and try again, train
            round after round alone (``"local"``), or ``"fail"``. What was released and not answered is sent
            again when it does answer. Noise that a mechanism adds to training is added all along.
        unreachable_seconds: The longest that ``"wait"`` waits before it fails.
        transfer_dtype: How values travel, both ways: ``"float32"``, or in half of the bytes ``"bfloat16"`` or
            ``"float16"``.
        overlap_steps: How many optimizer steps of a round are made while the exchange before it is still on
            its way: they start from this participant's own parameters, and what is downloaded is laid under
            them. Only at a server that gives no turns. 0 waits for each exchange.

    Raises:
        ConfigurationError: for an argument that cannot work, when the strategy is made or, where it
            depends on the module, before training starts.

    Without ``privacy`` no noise is added and nothing is claimed; with it, the mechanism's docstring says
    what is promised to whom, and ``docs/privacy.md`` what is not.
    """

    strategy_name = "dssgd"
    callback_class = DSSGDCallback
    private_class = PrivateTraining


class DSSGDDDPStrategy(SeveralDevices, DDPStrategy):
    """A participant on several devices: ``Trainer(strategy=DSSGDDDPStrategy(...), devices=2)``.

    Takes what :class:`DSSGDStrategy` and Lightning's ``DDPStrategy`` take. Gradients are averaged over the
    devices as ever; rank zero alone speaks with the server, and the other ranks hear from it.

    Raises:
        ConfigurationError: besides :class:`DSSGDStrategy`'s, for a ``start_method`` other than ``"popen"``,
            and for privacy at the level of records, which trains on one device.
    """

    strategy_name = "dssgd_ddp"
    callback_class = DSSGDCallback
    private_class = PrivateTraining
