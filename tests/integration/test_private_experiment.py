"""The features group and the private experiment, as the command line builds them."""

from __future__ import annotations

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from lightning_ppdl import config
from lightning_ppdl.cli.simulate import make_simulation
from lightning_ppdl.data import Features
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.report import summary
from lightning_ppdl.simulation import Simulation, simulate


def built(*overrides: str) -> Simulation:
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_ppdl.conf.ppdl", version_base="1.3"):
        return make_simulation(compose("simulate", list(overrides)))


def test_the_private_experiment_protects_every_image() -> None:
    job = built("experiment=mnist_private")
    assert isinstance(job.data, Features)
    assert isinstance(job.privacy, RecordLevel)
    assert (job.participants, job.rounds, job.round_length) == (90, 100, 1)
    assert (job.privacy.epsilon, job.privacy.delta) == (1.0, 1e-5)
    head = job.model(input_shape=(3969,), classes=10)
    assert sum(parameter.numel() for parameter in head.parameters()) == 39_690  # no bias


def test_data_come_as_they_are_unless_features_are_asked_for() -> None:
    assert not isinstance(built().data, Features)


def test_a_small_private_collaboration_on_features_learns() -> None:
    """The experiment's groups on 8 x 8 digits: 81 channels of 2 x 2."""
    groups = ["features=scattering", "model=linear", "protocol=synchronous", "privacy=record"]
    settings = ["participants=4", "partition.samples=300", "rounds=30", "round_length=1", "batch_size=150"]
    head = ["model.bias=false", "optimizer.lr=300", "privacy.clip=0.03", "baselines=[]"]
    facts = summary(simulate(built(*groups, *settings, *head)))
    assert facts["parameters"] == 324 * 10
    assert facts["accuracy"]["collaborative"] > 0.6
    assert 7.9 < facts["privacy"]["epsilon"] <= 8
