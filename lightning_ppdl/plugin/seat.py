"""What a participant does in a round, on rank zero: there it sits, with the module at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_ppdl.errors import BudgetExhaustedError, ConfigurationError
from lightning_ppdl.initial import Initial, initial_vector
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.participant import Participant
from lightning_ppdl.plugin.settings import Settings
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.mechanism import Exhausted
from lightning_ppdl.round_report import RoundReport


@dataclass(frozen=True)
class Told:
    """What rank zero tells all ranks of an exchange, so that they do the same.

    Args:
        assigned: Whether the module's shared values were overwritten.
        in_flight: Whether the exchange is still on its way.
        ends: What becomes of training where the budget is spent; None while it is not.
        metrics: What to log.
    """

    assigned: bool = False
    in_flight: bool = False
    ends: Exhausted | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Seat:
    """A participant and its module, from joining to leaving.

    Args:
        participant: Not joined yet.
        layout: What of the module is shared.
        settings: The participant's.
        reports: Where the report of each round is added.
    """

    def __init__(
        self,
        participant: Participant,
        layout: ParameterLayout,
        settings: Settings,
        reports: list[RoundReport],
    ) -> None:
        self._participant = participant
        self._layout = layout
        self._settings = settings
        self._reports = reports

    @property
    def account(self) -> Account | None:
        """Pays for private releases."""
        return self._participant.account

    @property
    def in_round(self) -> bool:
        """Whether a round is open that will be shared."""
        return self._participant.in_round

    @property
    def steps_exhausted(self) -> bool:
        """Whether the budget forbids the next private step; only these can use it up within a round."""
        account = self._participant.account
        return account is not None and account.mechanism.unit == "record" and self._participant.exhausted

    def enter(self, module: nn.Module) -> Told:
        """Join, and offer the first parameters to a server that has none.

        Raises:
            BudgetExhaustedError: if the budget has no room for a single release.
        """
        account = self._participant.account
        if account is not None and self._participant.exhausted:
            if account.mechanism.on_exhausted == "stop":
                raise BudgetExhaustedError(
                    f"{_spent(account)}: the ledger holds {account.spent()}. Raise max_epsilon if whoever "
                    f"answers for the data agrees, or give on_exhausted='local' to train alone"
                )
            return Told(ends=self._spend_no_more(account))
        if self._participant.join():
            self._offer_initial(module)
        return Told()

    def begin(self) -> Told:
        """Wait for the turn, download, and put what came into the module."""
        participant = self._participant
        if participant.account is not None and participant.exhausted:
            return Told(ends=self._spend_no_more(participant.account))
        start = participant.begin_round(self._layout.flatten())
        if start is None:
            return Told()
        self._assign(start)
        return Told(assigned=True)

    def add_gradients(self, parameters: list[nn.Parameter], factor: float) -> None:
        """Add the gradients of ``parameters``, times ``factor``, to what the open round shares."""
        self._layout.add_gradients(self._participant.gradients, parameters, factor)

    def finish(self, logged: bool) -> Told:
        """Release and upload what the round changed.

        Args:
            logged: Whether anybody looks at the metrics; a ledger's total takes a moment to find.
        """
        participant = self._participant
        metrics = {"ppdl/alone": 1.0}
        if participant.in_round:
            local = self._layout.flatten()
            if self._settings.overlap_steps:
                participant.end_round_in_flight(local)
                metrics = {}
            else:
                metrics = self._reported(participant.end_round(local))
        account = participant.account
        ends: Exhausted | None = None
        if account is not None:
            if logged:
                metrics |= {f"ppdl/{name}": value for name, value in account.metrics().items()}
            # Going on alone is for the next round to decide, if there is one.
            if account.mechanism.on_exhausted == "stop" and participant.exhausted:
                ends = self._spend_no_more(account)
        return Told(in_flight=participant.in_flight, metrics=metrics, ends=ends)

    def settle(self) -> Told:
        """Have the exchange end that is on its way, and put what came into the module."""
        report, start = self._participant.settle(self._layout.flatten())
        if start is not None:
            self._assign(start)
        return Told(assigned=start is not None, metrics=self._reported(report))

    def _assign(self, start: Tensor) -> None:
        self._layout.assign(start)
        if not self._layout.exact:
            self._participant.started_from(self._layout.flatten())

    def _reported(self, report: RoundReport) -> dict[str, float]:
        self._reports.append(report)
        figures = {f"ppdl/{name}": float(value) for name, value in asdict(report).items()}
        return {"ppdl/alone": 0.0, **figures}

    def abandon(self) -> None:
        """Give the round back: nothing was trained in it."""
        self._participant.abandon_round()

    def keep_turn(self) -> None:
        """Give a sign of life."""
        if self._participant.in_round:
            self._participant.keep_turn()

    def leave(self) -> None:
        """Leave the collaboration."""
        self._participant.leave()

    def state_dict(self, open_round: bool) -> dict[str, Any]:
        """The participant's; with what an open round needs to go on, or without it."""
        return self._participant.state_dict(open_round)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken; before :meth:`enter`."""
        self._participant.load_state_dict(state)

    def _offer_initial(self, module: nn.Module) -> None:
        initial, url = self._settings.initial, self._settings.backend.url
        if self._participant.round and isinstance(initial, int):
            raise ConfigurationError(
                f"this participant continues after round {self._participant.round}, but "
                f"{url} is new and has no parameters: with initial={initial!r} "
                f"all training so far would be thrown away. Give initial='own' to start it from this "
                f"participant's parameters (they leave this machine un-noised; refused beside a privacy "
                f"mechanism), a file, or begin anew with a new strategy and no ckpt_path"
            )
        taken = self._participant.offer_initial(initial_vector(initial, module, self._layout))
        rank_zero_info(
            f"{url} had no parameters yet and starts from "
            f"{_source(initial) if taken else 'what another participant offered first'}"
        )

    def _spend_no_more(self, account: Account) -> Exhausted:
        how = account.mechanism.on_exhausted
        if how == "local":
            rank_zero_warn(f"{_spent(account)}: training goes on without exchanging, and without noise")
            account.taint("its budget was spent, and on_exhausted='local'")
        else:
            rank_zero_info(f"{_spent(account)}: training ends")
        return how


def _spent(account: Account) -> str:
    privacy = account.mechanism
    return f"max_epsilon={privacy.max_epsilon!r} allows no further release of privacy={privacy.name!r}"


def _source(initial: Initial) -> str:
    if initial == "own":
        return "this module's own parameters, which left this machine un-noised (initial='own')"
    if isinstance(initial, int):
        return (
            f"public seed {initial}, not from this module's values (initial='own' or a file would keep "
            f"pretrained ones)"
        )
    return f"the file {initial}"
