"""Every example runs, and so does every Python block of the documentation; each has its effect checked."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lightning_ppdl
from lightning_ppdl import GrpcService, ParameterServer, RoundRobin

ROOT = Path(lightning_ppdl.__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
PPDL = "from lightning_ppdl.cli import main; raise SystemExit(main())"


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    """What a fresh interpreter prints; it must succeed."""
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def percents(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy ([\d.]+)%", output)]


def script(page: Path) -> str:
    """The page's Python blocks as one script, each line where it stands in the page."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    assert any(lines), f"{page} has no Python blocks"
    return "\n".join(lines) + "\n"


def run_page(page: Path, folder: Path, before: str = "", checks: str = "") -> str:
    """Run a page's blocks in ``folder``, and then ``checks``; a traceback gives the page's line."""
    source = folder / "page.py"
    source.write_text(script(page))
    setup = folder / "setup_page.py"
    setup.write_text(before)
    checked = folder / "check_page.py"
    checked.write_text(checks)
    code = "\n".join(
        f"exec(compile(open({str(part)!r}).read(), {str(name)!r}, 'exec'))"
        for part, name in ((setup, setup), (source, page), (checked, checked))
    )
    return run(["-c", code], folder, PYTHONPATH=str(EXAMPLES))


def test_participant(tmp_path: Path) -> None:
    output = run([str(EXAMPLES / "participant.py")], tmp_path)
    assert len(percents(output)) == 2
    assert min(percents(output)) > 80
    assert "the server merged 20 updates" in output


def test_clinics_in_processes_of_their_own(tmp_path: Path) -> None:
    server = ParameterServer(RoundRobin(), members=["clinic-a", "clinic-b"])
    service = GrpcService(server, "127.0.0.1:0")
    service.start()
    try:
        arguments = [[str(EXAMPLES / "clinic.py"), name, service.url] for name in ("clinic-a", "clinic-b")]
        with ThreadPoolExecutor() as threads:
            outputs = list(threads.map(lambda each: run(each, tmp_path), arguments))
        assert min(number for output in outputs for number in percents(output)) > 80
        assert server.version == 20
    finally:
        service.stop()


def test_custom_selection(tmp_path: Path) -> None:
    largest, any_entries = percents(run([str(EXAMPLES / "custom_selection.py")], tmp_path))
    assert largest > 80
    assert any_entries > 40


def test_custom_dataset(tmp_path: Path) -> None:
    collaborative, alone = percents(run([str(EXAMPLES / "custom_dataset.py")], tmp_path))
    assert collaborative > 90
    assert collaborative > alone


def test_custom_dataset_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["simulate", "--config-dir", str(EXAMPLES / "conf"), "data=wine", "model=linear"]
    more = ["participants=3", "baselines=[]", "hydra.run.dir=."]
    run(["-c", PPDL, *arguments, *more], tmp_path, PYTHONPATH=str(EXAMPLES))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"]["collaborative"] > 0.85
    assert summary["parameters"] == 13 * 3 + 3


def test_hydra_app(tmp_path: Path) -> None:
    app = str(EXAMPLES / "hydra_app" / "app.py")
    output = run([app, "--multirun", "ppdl.selection.fraction=1.0,0.1"], tmp_path)
    everything, a_tenth = percents(output)
    assert everything > 80
    assert a_tenth > 70
    sent = [int(found) for found in re.findall(r"(\d+) bytes up", output)]
    assert sent[1] < sent[0] / 5

    other = run([app, "ppdl/selection=random_above_threshold"], tmp_path)
    assert "RandomAboveThreshold" in other
    assert percents(other)[0] > 50


def test_readme(tmp_path: Path) -> None:
    before = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightning_ppdl.models import Classifier, linear
from functools import partial
images = torch.randn(200, 4)
labels = (images[:, 0] > 0).long()
loader = DataLoader(TensorDataset(images, labels), batch_size=10)
module = Classifier(linear((4,), 2), partial(torch.optim.SGD, lr=0.1), 2)
"""
    checks = """
from lightning_ppdl.backends.memory import find
status = find("memory://study").status()
assert status.uploads == 20 and [m.name for m in status.members] == ["clinic-a"], status
assert (module(images).argmax(1) == labels).float().mean() > 0.9
"""
    run_page(ROOT / "README.md", tmp_path, before, checks)


def test_readme_lists_every_public_name() -> None:
    readme = (ROOT / "README.md").read_text()
    reference = (DOCS / "api.md").read_text()
    for name in lightning_ppdl.__all__:
        assert f"`{name}`" in readme, name
        assert re.search(rf"\b{name}\b", reference), name


def test_quickstart(tmp_path: Path) -> None:
    checks = """
assert accuracy > 0.8, accuracy
assert server.status().uploads == 25 + 4, server.status()
assert [r.round for r in exchange.reports] == [11, 12, 13, 14]
assert all(r.merged for r in exchange.reports)
from lightning_ppdl.backends.memory import find
assert [m.name for m in find("memory://open").status().members] == ["clinic-c"]
assert find("memory://open").status().uploads == 2
assert find("memory://pretrained").status().uploads == 1
assert find("memory://backbone").status().parameters == 64 * 32 + 32
"""
    printed = run_page(DOCS / "quickstart.md", tmp_path, checks=checks).splitlines()
    assert [line for line in printed if line in ("20", "25")] == ["20", "25"]


def test_extending(tmp_path: Path) -> None:
    metadata = tmp_path / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lightning_ppdl.backends]\naudited = page:audited\n")
    checks = """
assert results.rows[-1].accuracy > 0.7, results
assert len(results.rows) == 6 and results.uploads == 24

# the entry point, as an installed package would announce it
import sys, types
sys.path.insert(0, ".")
page = sys.modules["page"] = types.ModuleType("page")
page.audited = audited
import pytorch_lightning as pl
from lightning_ppdl import DSSGDStrategy
from lightning_ppdl.data import loader
from lightning_ppdl.models import Classifier
module = Classifier(narrow((1, 8, 8), 10), partial(torch.optim.SGD, lr=0.1), 10)
strategy = DSSGDStrategy(server="audited://study", participant="clinic-a")
trainer = pl.Trainer(max_epochs=2, strategy=strategy, logger=False, enable_checkpointing=False)
trainer.fit(module, loader(Digits().load().test, 60))
lines = open("audit.log").read().splitlines()
assert len(lines) == 2 and lines[0].startswith("memory://study: "), lines
"""
    printed = run_page(DOCS / "extending.md", tmp_path, checks=checks)
    assert "['c', 'b', 'a']" in printed


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md") if ">>> " in p.read_text()))
def test_doctests_of(page: str) -> None:
    outcome = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert outcome.attempted and not outcome.failed
