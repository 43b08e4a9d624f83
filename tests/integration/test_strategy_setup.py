"""Making the strategy: by name, from the environment, on which device, and with which mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from strategy_harness import Tiny, everything, fit, loader, rounds, trainer, url

from lightning_ppdl import ConfigurationError, DSSGDCallback, DSSGDStrategy, LargestValues, connect

__all__ = ["url"]

BY_NAME = """
{imports}
trainer = pytorch_lightning.Trainer(
    strategy="dssgd", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False
)
print(type(trainer.strategy).__name__, trainer.strategy.server_url, trainer.strategy.participant)
"""


def in_a_fresh_interpreter(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PPDL_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning_ppdl, pytorch_lightning",
        "import pytorch_lightning, lightning_ppdl",
        # The module that defines it, while pytorch_lightning is not there yet.
        "from lightning_ppdl import DSSGDStrategy\nimport pytorch_lightning",
    ],
)
def test_by_name_whichever_is_imported_first(imports: str) -> None:
    result = in_a_fresh_interpreter(
        BY_NAME.format(imports=imports), PPDL_SERVER="memory://by-name", PPDL_PARTICIPANT="clinic-b"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "DSSGDStrategy memory://by-name clinic-b"


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({}, "PPDL_SERVER"),
        ({"PPDL_SERVER": ""}, "PPDL_SERVER"),
        ({"PPDL_SERVER": "memory://study"}, "PPDL_PARTICIPANT"),
    ],
)
def test_what_the_environment_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], missing: str
) -> None:
    for name in ("PPDL_SERVER", "PPDL_PARTICIPANT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argument = missing.removeprefix("PPDL_").lower()
    with pytest.raises(ConfigurationError, match=rf"{argument} is missing.*{missing}"):
        pl.Trainer(strategy="dssgd", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPDL_SERVER", "memory://environment")
    monkeypatch.setenv("PPDL_PARTICIPANT", "environment")
    strategy = DSSGDStrategy("memory://argument", "argument")
    assert (strategy.server_url, strategy.participant) == ("memory://argument", "argument")
    assert DSSGDStrategy().participant == "environment"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"server": "study"}, "server='study'"),
        ({"server": "http://study"}, "server='http://study'"),
        ({"participant": "  "}, "participant='  '"),
        ({"participant": "a\nb"}, r"participant='a\nb'"),
        ({"participant": ""}, "participant=''"),
        ({"selection": 0.1}, "selection=0.1"),
        ({"bound": 0}, "bound=0"),
        ({"download_fraction": 1.5}, "download_fraction=1.5"),
        ({"download_fraction": 0.0}, "download_fraction=0.0"),
        ({"round_length": 0}, "round_length=0"),
        ({"round_length": 2.5}, "round_length=2.5"),
        ({"round_length": "batch"}, "round_length='batch'"),
        ({"quantity": "weights"}, "quantity='weights'"),
        ({"quantity": "gradient", "share_buffers": "*"}, "share_buffers"),
        ({"turn_timeout_seconds": -1}, "turn_timeout_seconds=-1"),
    ],
)
def test_bad_arguments_are_named_at_once(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        DSSGDStrategy(**{"server": "memory://study", "participant": "anna", **settings})
    assert named in str(raised.value)


def test_making_it_touches_no_server(url: str) -> None:
    DSSGDStrategy(url, "anna")
    trainer(DSSGDStrategy(url, "anna"))
    status = connect(url).status()
    assert status.members == () and status.parameters == 0


def test_one_device_it_is(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"devices=2: .*Trainer\(devices=1\)"):
        trainer(DSSGDStrategy(url, "anna"), devices=2)
    assert trainer(DSSGDStrategy(url, "anna")).strategy.root_device == torch.device("cpu")


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As many GPUs as asked for, as far as Lightning's choice of devices can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for module in ("lightning_fabric.accelerators.cuda", "pytorch_lightning.accelerators.cuda"):
        monkeypatch.setattr(f"{module}.num_cuda_devices", lambda: count)


@pytest.mark.parametrize(("devices", "expected"), [(1, 0), ([0], 0), ([1], 1), ("1,", 1)])
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
def test_the_device_is_the_trainers(
    monkeypatch: pytest.MonkeyPatch, url: str, devices: Any, expected: int, accelerator: str
) -> None:
    pretend_cuda(monkeypatch, 2)
    made = trainer(DSSGDStrategy(url, "anna"), accelerator=accelerator, devices=devices)
    assert isinstance(made.accelerator, CUDAAccelerator)
    assert made.strategy.root_device == torch.device("cuda", expected)


def test_several_gpus_are_refused_not_ignored(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    pretend_cuda(monkeypatch, 2)
    for devices in (2, [0, 1], "auto", -1):
        with pytest.raises(ConfigurationError, match="devices=2"):
            trainer(DSSGDStrategy(url, "anna"), accelerator="gpu", devices=devices)


class Elsewhere(CPUAccelerator):
    """Hands out a device of another type, as a GPU's accelerator does."""

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("meta")]

    def setup_device(self, device: torch.device) -> None:
        assert device.type == "meta"


def test_an_accelerator_object_decides_too(url: str) -> None:
    made = trainer(DSSGDStrategy(url, "anna"), accelerator=Elsewhere())
    assert made.strategy.root_device == torch.device("meta")


def test_by_name_the_device_is_right_too(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    pretend_cuda(monkeypatch, 1)
    monkeypatch.setenv("PPDL_SERVER", url)
    monkeypatch.setenv("PPDL_PARTICIPANT", "anna")
    assert trainer("dssgd", accelerator="gpu").strategy.root_device == torch.device("cuda", 0)


def test_the_callback_alone_says_what_it_needs() -> None:
    with pytest.raises(ConfigurationError, match=r"strategy=DSSGDStrategy.*not .*SingleDeviceStrategy"):
        fit(Tiny(), callbacks=[DSSGDCallback()])


class WithLBFGS(Tiny):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1)


def test_lbfgs_shares_changes_and_no_gradients(url: str) -> None:
    made = fit(WithLBFGS(), everything(url))
    assert len(rounds(made)) == 3 and rounds(made)[0].uploaded_fraction == 1.0
    with pytest.raises(ConfigurationError, match="does not fit LBFGS"):
        fit(WithLBFGS(), everything(f"{url}-gradient", quantity="gradient"))


@pytest.mark.parametrize("initial", [3, "own"])
def test_what_the_server_starts_from(url: str, initial: Any) -> None:
    strategy = DSSGDStrategy(url, "anna", selection=LargestValues(1.0), initial=initial)
    still = Tiny(lr=0.0)
    before = torch.cat([p.detach().clone().reshape(-1) for p in still.parameters()])
    made = trainer(strategy, epochs=1)
    made.fit(still, loader())
    after = torch.cat([p.detach().reshape(-1) for p in still.parameters()])
    assert torch.equal(before, after) == (initial == "own")
    second = Tiny(lr=0.0)
    fit(second, DSSGDStrategy(url, "ben", initial=99), epochs=1)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in second.parameters()]), after)


@pytest.mark.parametrize("initial", ["nowhere.safetensors", "OWN"])
def test_a_start_that_is_not_there_is_named(url: str, initial: str) -> None:
    with pytest.raises(ConfigurationError, match=f"initial='{initial}' (cannot be read|must be a)"):
        fit(Tiny(), DSSGDStrategy(url, "anna", initial=initial))
