"""Everything fails at random instants, and nothing is lost, merged twice, or sent without being counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_harness import Chaos


@pytest.mark.parametrize("protocol", ["asynchronous", "round_robin"])
def test_what_was_acknowledged_is_merged_exactly_once(tmp_path: Path, protocol: str) -> None:
    outcome = Chaos(tmp_path, protocol, participants=3, seed=7).run(seconds=10)
    assert outcome.violations == []
    # It did happen, all of it.
    assert min(outcome.server_kills, outcome.participant_kills, outcome.cuts, outcome.full_disks) >= 1
    assert outcome.acknowledged >= 10 and outcome.merged >= outcome.acknowledged
