"""The wheel: what is inside, and that commands and groups work from it as they do from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run a command in a clean environment, with `path` in front of the installed packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}
    environment["OMP_NUM_THREADS"] = "1"
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, ROOT, cwd=target)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    call(*pip, "--target", target, wheel, cwd=target)
    return target


def source_of(path: Path | None, cwd: Path) -> Path:
    """The folder that `import lightning_ppdl` finds."""
    script = "import lightning_ppdl; print(lightning_ppdl.__file__)"
    return Path(call(sys.executable, "-c", script, cwd=cwd, path=path).strip()).parents[1]


def test_the_wheel_holds_all_code_all_groups_and_the_marker_of_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    held = set(names)
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lightning_ppdl").rglob("*.py")
        if "conf" not in path.relative_to(ROOT).parts
    }
    groups = {f"lightning_ppdl/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert len(groups) > 20
    assert modules | groups <= held
    assert {
        "lightning_ppdl/py.typed",
        "lightning_ppdl/conf/__init__.py",
        "lightning_ppdl/conf/ppdl/__init__.py",
        "hydra_plugins/lightning_ppdl_searchpath.py",
    } <= held
    # Hydra's plugins share one namespace package: an __init__.py of ours would hide all others.
    assert "hydra_plugins/__init__.py" not in held
    tops = {name.split("/")[0] for name in held}
    assert tops - {"lightning_ppdl", "hydra_plugins"} == {t for t in tops if t.endswith(".dist-info")}


def test_the_wheel_brings_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        text = archive.read(entry).decode()
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        facts = archive.read(metadata).decode()
    assert "ppdl = lightning_ppdl.cli:main" in text
    assert "Provides-Extra: simulate" in facts and "Requires-Dist: hydra-core" in facts


def test_ppdl_composes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert source_of(installed, tmp_path) == installed
    script = "import sys; from lightning_ppdl.cli import main; sys.exit(main())"
    arguments = ["simulate", "--cfg", "job", "experiment=mnist_mlp", "download.criterion=most_recent"]
    shown: Any = OmegaConf.create(
        call(sys.executable, "-c", script, *arguments, cwd=tmp_path, path=installed)
    )
    assert shown["participants"] == 30
    assert shown["data"]["_target_"] == "lightning_ppdl.data.MNIST"
    assert shown["download"]["criterion"]["_target_"].endswith("MostRecent")


FOREIGN = """
    import sys

    import hydra
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.3", config_path="conf", config_name="app")
    def app(cfg):
        print(OmegaConf.to_yaml(cfg))
        print("heavy:", sorted({"torch", "pytorch_lightning", "lightning", "sklearn"} & set(sys.modules)))
        if cfg.make:
            print("made:", hydra.utils.instantiate(cfg.ppdl.selection))

    app()
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Somebody else's Hydra application, which picks one of our groups."""
    (tmp_path / "app.py").write_text(textwrap.dedent(FOREIGN))
    (tmp_path / "conf").mkdir()
    lines = ["defaults:", "  - ppdl/selection: largest_values", "  - _self_", "make: false"]
    (tmp_path / "conf" / "app.yaml").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("kind", ["wheel", "checkout"])
def test_a_foreign_application_uses_our_groups(
    kind: str, foreign: Path, request: pytest.FixtureRequest
) -> None:
    path: Path | None = request.getfixturevalue("installed") if kind == "wheel" else None
    assert source_of(path, foreign) == (path or ROOT)
    changes = ["ppdl/selection=random_above_threshold", "ppdl.selection.fraction=0.25", "make=true"]
    chosen = call(sys.executable, "app.py", cwd=foreign, path=path)
    assert "_target_: lightning_ppdl.selection.LargestValues" in chosen
    # The plugin runs in every Hydra application of the environment: it must not slow them down.
    assert "heavy: []" in chosen
    made = call(sys.executable, "app.py", *changes, cwd=foreign, path=path)
    assert "made: RandomAboveThreshold(fraction=0.25, threshold=0.0001)" in made


def test_a_foreign_application_without_our_groups_stays_as_light(foreign: Path) -> None:
    (foreign / "conf" / "app.yaml").write_text("make: false\n")
    assert "heavy: []" in call(sys.executable, "app.py", cwd=foreign)
