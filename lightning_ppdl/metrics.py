"""What a collaboration costs in bytes, as a metric that any LightningModule can own and log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.round_report import RoundReport
from lightning_ppdl.validation import require_choice

Direction = Literal["both", "upload", "download"]
Unit = Literal["byte", "kB", "MB", "GB"]

_BYTES = {"byte": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


class CommunicationCost(Metric):
    """Bytes that a participant's rounds sent and received, as encoded messages.

    A module owns one, feeds it and logs it; each round is counted once, however often it is handed over::

        def __init__(self):
            super().__init__()
            self.cost = CommunicationCost()

        def on_train_epoch_start(self):
            self.cost.reset()

        def on_train_epoch_end(self):
            self.cost.update(self.trainer.strategy.reports)
            self.log("communication", self.cost)

    :meth:`compute` is the cost since the last :meth:`reset`, and :attr:`total` that of all rounds ever
    counted. Lightning resets a metric that was logged as an object at the end of the epoch, so the above logs
    each epoch's cost; ``self.log("in_all", self.cost.total.float())`` logs a curve that only rises. A metric
    that is never logged is never reset: there the two are equal. Which rounds were counted is remembered
    over resets, and in checkpoints together with both values. Lightning saves at an epoch's end before it
    resets; without the reset in ``on_train_epoch_start`` the first epoch after a resume would be
    logged with the one before it. A last round of fewer than ``round_length`` steps is shared after the last
    epoch's end; :meth:`update` in ``on_train_end`` adds it to the total.

    Bytes are counted for every round that was shared, whether the server merged its update or not: they
    were sent. What is sent again because it was not answered, and what the transport adds (headers, TLS), is
    not counted; rounds that are trained alone cost nothing. A report ends with its process, so rounds that
    were shared after the last checkpoint of a process that was killed are missing.

    In a participant of several devices only rank zero has reports: :meth:`compute` sums over the ranks,
    and :attr:`total` is that of its own process.

    The figures stay on this machine, with the Trainer's loggers, and are never sent to the server. They are
    of messages that the server and the network see anyway; but what else a module logs (a loss, an
    accuracy) is computed from the data without noise, and a logger that others read gives it to them.

    Args:
        direction: ``"both"``, ``"upload"`` or ``"download"``, seen from the participant.
        unit: ``"byte"``, ``"kB"`` (1,000 bytes), ``"MB"`` or ``"GB"``.
        kwargs: As for every :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: for a direction or unit that is none of these; by :meth:`update`, for what is
            no report.

    Example:
        >>> from lightning_ppdl import CommunicationCost
        >>> from lightning_ppdl.round_report import RoundReport
        >>> first, second = (
        ...     RoundReport(
        ...         round=number, merged=True, uploaded_bytes=500, downloaded_bytes=2000, released_values=90,
        ...         uploaded_fraction=0.1, clamped_fraction=0.0, staleness=0, update_norm=0.3,
        ...         exchange_seconds=0.01, wait_seconds=0.0,
        ...     )
        ...     for number in (1, 2)
        ... )
        >>> cost = CommunicationCost(unit="kB")
        >>> cost.update([first])
        >>> cost.compute()
        tensor(2.5000)
        >>> cost.reset()  # as Lightning does after each epoch
        >>> cost.update([first, second])
        >>> cost.compute(), cost.total
        (tensor(2.5000), tensor(5.))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    uploaded_bytes: Tensor
    downloaded_bytes: Tensor

    def __init__(self, direction: Direction = "both", unit: Unit = "byte", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.direction = require_choice("direction", direction, get_args(Direction))
        self.unit = require_choice("unit", unit, get_args(Unit))
        for name in ("uploaded_bytes", "downloaded_bytes"):
            self.add_state(name, torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        # A MetricCollection updates one of several metrics with equal states, and copies its states to the
        # others; these would not learn which rounds were counted. NaN equals nothing.
        self.add_state("apart", torch.tensor(torch.nan), dist_reduce_fx="sum")
        # By the report's digest: numbers begin anew with another collaboration. Not a state of torchmetrics,
        # which reset() would forget.
        self._counted: dict[int, tuple[int, int]] = {}

    def update(self, reports: RoundReport | Sequence[RoundReport]) -> None:
        """Count those of ``reports``, one or all so far, that were not counted yet."""
        for report in _as_reports(reports):
            digest = _digest(report)
            if digest not in self._counted:
                self._counted[digest] = report.uploaded_bytes, report.downloaded_bytes
                self.uploaded_bytes = self.uploaded_bytes + report.uploaded_bytes
                self.downloaded_bytes = self.downloaded_bytes + report.downloaded_bytes

    def compute(self) -> Tensor:
        """The cost since the last reset, (): int64 in bytes, floating in a larger unit; 0 for no rounds."""
        return self._measure(self.uploaded_bytes, self.downloaded_bytes)

    @property
    def total(self) -> Tensor:
        """The cost of all rounds counted here or in what this was restored from; as :meth:`compute` says."""
        uploaded, downloaded = self.get_extra_state()[:, 1:].sum(0).to(self.device)
        return self._measure(uploaded, downloaded)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of values, by default :meth:`compute`'s.

        Args:
            val: What :meth:`compute` or :meth:`forward` returned, once or in a list.
            ax: The matplotlib axes to draw on; None for a new figure.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add another one's cost, such as another participant's; as for every torchmetrics metric."""
        super().merge_state(incoming_state)
        if isinstance(incoming_state, CommunicationCost):
            self._counted |= incoming_state._counted

    def get_extra_state(self) -> Tensor:
        """The rounds counted, int64 (rounds, 3): each report's digest, bytes up, bytes down."""
        rows = [(digest, *sizes) for digest, sizes in self._counted.items()]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the rounds counted from a checkpoint."""
        self._counted = {digest: (up, down) for digest, up, down in state.tolist()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        # Checkpoints of the module from before it had this metric load too: nothing of it is ever missing.
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, [], *others)

    def _measure(self, uploaded: Tensor, downloaded: Tensor) -> Tensor:
        sizes = {"both": uploaded + downloaded, "upload": uploaded, "download": downloaded}
        size = sizes[self.direction]
        # float32 would round from 16 MB on; whole bytes stay whole.
        return size if self.unit == "byte" else size / _BYTES[self.unit]


def _as_reports(reports: RoundReport | Iterable[RoundReport]) -> list[RoundReport]:
    if isinstance(reports, RoundReport):
        return [reports]
    listed = list(reports) if isinstance(reports, Iterable) else None
    if listed is None or not all(isinstance(report, RoundReport) for report in listed):
        raise ConfigurationError(
            f"reports={reports!r} must be a RoundReport, or a sequence of them such as "
            f"self.trainer.strategy.reports"
        )
    return listed


def _digest(report: RoundReport) -> int:
    """64 bits, the same in every process; the times in a report make it unlike any other."""
    content = repr(report).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)
