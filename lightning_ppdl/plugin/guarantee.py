"""What a mechanism's guarantee needs of a Trainer beyond the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_ppdl.errors import ConfigurationError, TaintedStateError
from lightning_ppdl.layout import ParameterLayout, named_parameters
from lightning_ppdl.plugin.packages import callbacks_of
from lightning_ppdl.privacy.account import Account

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Modules that were trained in this process without record-level noise: what follows from them is no
# post-processing of private steps. A checkpoint says so of the modules of other processes.
_noiseless_modules: WeakSet[nn.Module] = WeakSet()


def check_trainer(trainer: pl.Trainer, account: Account) -> None:
    """Refuse what would let private data decide when something is released.

    Raises:
        ConfigurationError: naming the setting, with the reason and the remedy.
    """
    privacy = account.mechanism
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"fast_dev_run={trainer.fast_dev_run!r} beside privacy={privacy.name!r}: what the few batches "  # type: ignore[attr-defined]
            f"release would be charged to the data set's ledger, and noise be calibrated to them; leave out "
            f"privacy, at a server for trials"
        )
    if not privacy.public_validation and callbacks_of(trainer, "EarlyStopping"):
        raise ConfigurationError(
            "EarlyStopping decides by a metric without noise how much is released; leave it out, or "
            "declare the validation data public with public_validation=True"
        )
    if privacy.max_epsilon is not None and privacy.on_exhausted == "stop":
        for name in ("min_epochs", "min_steps"):
            if getattr(trainer, name):
                raise ConfigurationError(
                    f"{name}={getattr(trainer, name)!r}: the budget max_epsilon={privacy.max_epsilon!r} "
                    f"may have to end training earlier; leave it out, or give on_exhausted='local'"
                )


def check_history(module: nn.Module, layout: ParameterLayout, account: Account, noiseless: bool) -> None:
    """Refuse, at the level of records, what was trained without noise before.

    Args:
        module: What is going to be trained.
        layout: What of it is shared.
        account: Of a record-level mechanism.
        noiseless: Whether the checkpoint that it goes on from was.

    Raises:
        TaintedStateError: if it was, or may have been.
    """
    account.require_untainted()
    if noiseless or module in _noiseless_modules:
        raise TaintedStateError(
            "this module, or the checkpoint it continues from, was trained without noise, or by a "
            "Trainer that kept no record of it: what follows from it cannot be released at the level of "
            "records. Begin with a new module, and continue only from checkpoints of record-level "
            "training"
        )
    shared = {spec.name for spec in layout.specs}
    local = [name for name, p in named_parameters(module) if p.requires_grad and name not in shared]
    if local:
        rank_zero_warn(
            f"{len(local)} trainable parameters, {local[0]!r} first, stay local and keep the values that "
            f"they have now: the guarantee needs these to come from no private data, or from private "
            f"steps only"
        )


def remember_noiseless(module: nn.Module) -> None:
    """From here on ``module`` is trained without noise at the level of records."""
    _noiseless_modules.add(module)
