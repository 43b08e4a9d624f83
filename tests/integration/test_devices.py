"""A participant of several devices: real processes under gloo, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategy_harness import Tiny, everything, fit, url

from lightning_ppdl import ConfigurationError, DSSGDDDPStrategy, DSSGDStrategy, RecordLevel

__all__ = ["url"]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, of every scenario: starting two processes takes far longer than training."""
    results = tmp_path_factory.mktemp("ddp") / "results"
    command = [sys.executable, str(HERE / "ddp_participant.py"), str(results)]
    environment = {name: value for name, value in os.environ.items() if name != "PPDL_SERVER"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=results.parent
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(Path(f"{results}.{rank}").read_text()) for rank in (0, 1)]


def both(ranks: list[dict[str, Any]], scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return ranks[0][scenario], ranks[1][scenario]


def test_alone_it_is_plain_ddp_training_and_rank_zero_alone_speaks(ranks: list[dict[str, Any]]) -> None:
    zero, one = both(ranks, "as_plain_training")
    assert (zero["uploads"], zero["reports"], zero["members"]) == (3, 3, 1)
    # Rank one's server is another one, in its own process, under the same address: nobody came to it.
    assert (one["uploads"], one["reports"], one["members"]) == (0, 0, 0)
    assert zero["values"] == one["values"] and zero["steps"] == one["steps"] == 9
    np.testing.assert_allclose(zero["values"], zero["plain"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(zero["server"], zero["values"], rtol=1e-4, atol=1e-5)
    assert zero["reports_later"] == 4 and one["reports_later"] == 0


@pytest.mark.parametrize("scenario", ["others_upload_too", "others_upload_too_and_training_goes_on"])
def test_what_rank_zero_downloads_reaches_the_others(ranks: list[dict[str, Any]], scenario: str) -> None:
    zero, one = both(ranks, scenario)
    assert zero["members"] == 2 and zero["reports"] == 5  # of two steps, the last of one
    assert zero["uploads"] == zero["reports"] + 3
    assert zero["values"] == one["values"]
    # Ben's last upload came after the last download; the two before are in everybody's parameters.
    own = np.array(zero["server"]) - 0.25
    np.testing.assert_allclose(own, zero["values"], rtol=1e-4, atol=1e-5)


def test_gradients_are_the_mean_over_the_ranks(ranks: list[dict[str, Any]]) -> None:
    zero, one = both(ranks, "gradients")
    assert zero["values"] == one["values"] and zero["uploads"] == 1
    # The server's optimizer has the learning rate of local SGD, without momentum.
    np.testing.assert_allclose(zero["server"], zero["values"], rtol=1e-4, atol=1e-5)


def test_a_spent_budget_ends_training_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    zero, one = both(ranks, "budget")
    assert 1 <= zero["epochs"] == one["epochs"] < 50
    assert zero["uploads"] == zero["reports"] == zero["epochs"]
    assert zero["values"] == one["values"]


def test_an_error_of_rank_zeros_exchange_ends_the_others(ranks: list[dict[str, Any]]) -> None:
    zero, one = both(ranks, "failure")
    assert zero["error"] == "RuntimeError" and zero["text"] == "no selection today"
    assert one["error"] == "RankZeroFailedError" and "RuntimeError: no selection today" in one["text"]
    assert zero["awaited"] == []


@pytest.mark.parametrize("strategy", ["dssgd", None])
def test_several_devices_are_refused_by_name_where_one_trains(
    strategy: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPDL_SERVER", url)
    monkeypatch.setenv("PPDL_PARTICIPANT", "anna")
    with pytest.raises(ConfigurationError, match=r"devices=2.*dssgd_ddp"):
        fit(Tiny(), strategy or everything(url), devices=2)
    with pytest.raises(ConfigurationError, match=r"num_nodes=2.*dssgd_ddp"):
        fit(Tiny(), strategy or everything(url), num_nodes=2)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_that_end_with_fit_are_refused(method: Any, url: str) -> None:
    with pytest.raises(ConfigurationError, match=f"start_method='{method}': only 'popen'"):
        DSSGDDDPStrategy(url, "anna", start_method=method)


def test_records_are_protected_on_one_device_only(url: str) -> None:
    with pytest.raises(ConfigurationError, match="privacy='record' trains on one device"):
        DSSGDDDPStrategy(url, "anna", privacy=RecordLevel(noise_multiplier=1.0, delta=1e-5, clip=1.0))


@pytest.mark.parametrize("strategy", [DSSGDStrategy, DSSGDDDPStrategy])
def test_a_misspelt_argument_is_named(strategy: type[DSSGDStrategy], url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"particpant='anna'.*did you mean participant\?"):
        strategy(url, particpant="anna")


def test_what_ddp_takes_is_passed_on(url: str) -> None:
    strategy = DSSGDDDPStrategy(url, "anna", find_unused_parameters=True, process_group_backend="gloo")
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert strategy.process_group_backend == "gloo"
