"""One server and its participants, every one a process: what a collaboration between machines is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from join_harness import Joined
from safetensors.torch import load_file

from lightning_ppdl import Add, ParameterServer, data
from lightning_ppdl.evaluation import Evaluator
from lightning_ppdl.keys import make_keys
from lightning_ppdl.models import Classifier, mlp
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol, RandomOrder, RoundRobin
from lightning_ppdl.server.security import Security
from lightning_ppdl.server.service import GrpcService
from lightning_ppdl.server.state import StateDirectory

MNIST = Path(__file__).resolve().parents[3] / "shared/data/mnist"
SMALL = ["participants=2", "optimizer.lr=0.2", "partition.samples=400", "model.hidden=[16]"]


class Serving:
    """A server in this process, for participants in others; it can be stopped and go on."""

    def __init__(self, directory: Path, protocol: ExchangeProtocol, members: list[str]) -> None:
        self._state, self._protocol, self._members = directory, protocol, members
        self._port = 0
        self.start()

    def start(self) -> None:
        self.server = ParameterServer(
            self._protocol, Add(), self._members, lease_seconds=20.0, state=StateDirectory(self._state)
        )
        self.service = GrpcService(self.server, f"127.0.0.1:{self._port}")
        self.service.start()
        self.url = self.service.url
        self._port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.service.stop()
        self.server.close()

    def rounds(self) -> dict[str, int]:
        return {member.name: member.rounds for member in self.server.status().members}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path / "state", RoundRobin(), ["anna", "ben"])
    yield made
    made.stop()


@pytest.mark.parametrize("protocol", [RoundRobin(), RandomOrder(seed=3), Asynchronous()])
def test_four_participants_with_tls_learn_mnist_together(tmp_path: Path, protocol: ExchangeProtocol) -> None:
    names = ["anna", "ben", "cleo", "dora"]
    keys = tmp_path / "keys"
    make_keys(keys, ["127.0.0.1"], names)
    server = ParameterServer(protocol, members=names, state=StateDirectory(tmp_path / "state"))
    security = Security(keys / "server.pem", keys / "server-key.pem", keys / "ca.pem", keys / "tokens.txt")
    service = GrpcService(server, "127.0.0.1:0", security)
    service.start()
    try:
        joined = [
            Joined(
                tmp_path / "work",
                service.url,
                name,
                *(f"ca={keys}/ca.pem", f"certificate={keys}/{name}.pem", f"key={keys}/{name}-key.pem"),
                *(f"token_file={keys}/{name}.token", "participants=4", f"share={number}"),
                *("data=mnist", f"data.root={MNIST}", "data.normalize=true", "partition.samples=600"),
                *("rounds=4", "selection.fraction=0.1", "transfer_dtype=bfloat16"),
            )
            for number, name in enumerate(names, start=1)
        ]
        assert [each.wait() for each in joined] == [0] * 4, joined[0].log
        status = server.status()
        assert status.version == status.uploads == 16 and not status.rejections
        assert [member.rounds for member in status.members] == [4] * 4
        for each in joined:
            assert "shared 4 rounds, 4 of them merged" in each.log
            orders = [float(row["ppdl/staleness"]) for row in each.rounds()]
            assert isinstance(protocol, Asynchronous) or orders == [0.0] * 4
            assert len(load_file(each.directory / "model.safetensors")) == 6
        # What they have learnt together; alone on 600 images each ends below 84%.
        splits = data.MNIST(MNIST, normalize=True).load()
        module = Classifier(mlp((1, 32, 32), 10), partial(torch.optim.SGD, lr=0.1), 10)
        evaluator = Evaluator(module, splits.test, 10)
        assert evaluator.of_vector(torch.from_numpy(server.parameters()), module) > 0.86
    finally:
        service.stop()
        server.close()


def test_two_devices_are_one_participant(tmp_path: Path, serving: Serving) -> None:
    """Lightning starts the second process from the command line, subcommand and all."""
    anna = Joined(tmp_path, serving.url, "anna", *SMALL, "rounds=3", "share=1", "trainer.devices=2")
    ben = Joined(tmp_path, serving.url, "ben", *SMALL, "rounds=3", "share=2")
    assert [anna.wait(), ben.wait()] == [0, 0], anna.log
    assert serving.rounds() == {"anna": 3, "ben": 3} and serving.server.status().uploads == 6
    assert anna.log.count("shared 3 rounds, 3 of them merged") == 1
    assert len(anna.rounds()) == len(ben.rounds()) == 3


def test_of_two_devices_one_says_what_went_wrong(tmp_path: Path, serving: Serving) -> None:
    stranger = Joined(tmp_path, serving.url, "eve", *SMALL, "rounds=3", "share=1", "trainer.devices=2")
    assert stranger.wait() != 0
    assert stranger.log.count("participant='eve' is not among the members") == 1


def test_who_is_killed_goes_on_from_its_checkpoint_as_itself(tmp_path: Path, serving: Serving) -> None:
    settings = [
        *SMALL,
        "rounds=8",
        "privacy=participant",
        "privacy.noise_multiplier=0.01",
        "privacy.epsilon=null",
    ]
    ben = Joined(tmp_path, serving.url, "ben", *settings, "share=2")
    for _ in range(3):
        anna = Joined(tmp_path, serving.url, "anna", *settings, "share=1")
        anna.wait_for_checkpoint()
        time.sleep(0.05)
        anna.kill()
    anna = Joined(tmp_path, serving.url, "anna", *settings, "share=1")
    assert (anna.wait(), ben.wait()) == (0, 0), anna.log + ben.log
    # Eight rounds each, numbered 1 to 8, whatever happened in between; and no release that was not paid for.
    assert serving.rounds() == {"anna": 8, "ben": 8}
    assert serving.server.status().uploads == serving.server.version == 16
    with Ledger(tmp_path / "anna.ledger") as ledger:
        assert {entry.round for entry in ledger.entries() if entry.released_values} == set(range(1, 9))


def test_a_server_that_restarts_is_waited_for(tmp_path: Path, serving: Serving) -> None:
    settings = [*SMALL, "rounds=10"]
    anna = Joined(tmp_path, serving.url, "anna", *settings, "share=1")
    ben = Joined(tmp_path, serving.url, "ben", *settings, "share=2")
    anna.wait_for_checkpoint()
    for pause in (0.0, 1.5):
        serving.stop()
        time.sleep(pause)
        serving.start()
        time.sleep(0.3)
    assert (anna.wait(), ben.wait()) == (0, 0), anna.log + ben.log
    assert serving.rounds() == {"anna": 10, "ben": 10} and serving.server.version == 20
    assert "trying again for up to 600 seconds" in anna.log + ben.log
    assert "answers again" in anna.log + ben.log


def test_training_goes_on_alone_while_the_server_is_away(tmp_path: Path) -> None:
    serving = Serving(tmp_path / "state", Asynchronous(), ["anna"])
    anna = Joined(tmp_path, serving.url, "anna", *SMALL, "rounds=60", "share=1", "on_unreachable=local")
    anna.wait_for_checkpoint()
    serving.stop()
    deadline = time.monotonic() + 60
    while "trains this round alone" not in anna.log:
        assert anna.process.poll() is None and time.monotonic() < deadline, anna.log
        time.sleep(0.02)
    serving.start()
    try:
        assert anna.wait() == 0, anna.log
        rows = anna.rounds()
        alone = [row["ppdl/alone"] == "1.0" for row in rows]
        assert any(alone) and len(rows) == 60
        # Numbered without a gap, and in the end all that was released is merged.
        assert serving.rounds() == {"anna": 60 - sum(alone)} and serving.server.version == 60 - sum(alone)
    finally:
        serving.stop()


@pytest.mark.parametrize(("choice", "seconds"), [("fail", 600), ("wait", 1)])
def test_an_unreachable_server_ends_training_within_its_time(
    tmp_path: Path, choice: str, seconds: int
) -> None:
    unreachable = [f"on_unreachable={choice}", f"unreachable_seconds={seconds}"]
    anna = Joined(tmp_path, "grpc://127.0.0.1:9", "anna", *SMALL, *unreachable)
    assert anna.wait() == 1
    assert "ppdl join: 'grpc://127.0.0.1:9' did not answer" in anna.log and "Traceback" not in anna.log


def test_metrics_of_earlier_lives_stay(tmp_path: Path, serving: Serving) -> None:
    ben = Joined(tmp_path, serving.url, "ben", *SMALL, "rounds=3", "share=2")
    for rounds in (1, 3):
        anna = Joined(tmp_path, serving.url, "anna", *SMALL, f"rounds={rounds}", "share=1")
        assert anna.wait() == 0, anna.log
    assert ben.wait() == 0
    assert [float(row["ppdl/round"]) for row in anna.rounds()] == [1, 2, 3]


def test_ctrl_c_gives_the_turn_back(tmp_path: Path, serving: Serving) -> None:
    anna = Joined(tmp_path, serving.url, "anna", *SMALL, "rounds=500", "share=1", "batch_size=1")
    deadline = time.monotonic() + 60
    while serving.rounds().get("anna") is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    anna.process.send_signal(2)
    assert anna.wait() == 130
    assert [member.present for member in serving.server.status().members if member.name == "anna"] == [False]
