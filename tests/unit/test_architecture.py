"""The arrows between the rooms: who may import whom. Read from the sources, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_ppdl

NAME = "lightning_ppdl"
ROOT = Path(lightning_ppdl.__file__).parent
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}

# Optional extras, and the one file each that may import them.
EXTRAS: dict[str, set[str]] = {
    "grpc": {f"{NAME}.backends.channel", f"{NAME}.server.service"},
    "redis": set(),
    "ray": set(),
    "absl": {f"{NAME}.privacy.composition"},
    "cryptography": {f"{NAME}.keys"},
    "dp_accounting": {f"{NAME}.privacy.composition"},
    "opacus": {f"{NAME}.privacy.record.layers"},
    "opendp": {f"{NAME}.privacy.samplers"},
    "prometheus_client": {f"{NAME}.server.observe.metrics"},
    "randomgen": {f"{NAME}.privacy.noise"},
}


@dataclass(frozen=True)
class Import:
    """``module`` is absolute; ``lazy`` inside a function, ``typing`` under TYPE_CHECKING."""

    module: str
    lazy: bool
    typing: bool


def modules(root: Path, name: str) -> dict[str, Path]:
    """Every module of the package, by dotted name. ``conf`` holds YAML, through a link."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "conf":
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(module: str, known: dict[str, Path]) -> list[Import]:
    """All that ``module`` imports, with names of submodules told apart from names within modules."""
    path = known[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0]
                base = f"{parent}.{base}".rstrip(".")
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield Import(submodule if submodule in known else base, lazy, typing)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for guarded in node.body:
                yield from walk(guarded, lazy, True)
            for other in node.orelse:
                yield from walk(other, lazy, typing)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, lazy or inside, typing)

    return list(walk(ast.parse(path.read_text()), lazy=False, typing=False))


def within(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"{NAME}.{name}" for name in names)


MODULES = modules(ROOT, NAME)
IMPORTS = {module: imports(module, MODULES) for module in MODULES}


def third_party(module: str) -> set[str]:
    roots = {found.module.partition(".")[0] for found in IMPORTS[module]}
    return roots - set(sys.stdlib_module_names) - {NAME}


def test_the_sources_were_found() -> None:
    assert {f"{NAME}.server.core", f"{NAME}.plugin.strategy", NAME} <= set(MODULES)
    assert "pytorch_lightning" in third_party(f"{NAME}.pytorch_lightning")


def test_server_and_backends_never_see_what_is_private() -> None:
    forbidden = rooms(
        "privacy",
        "participant",
        "plugin",
        "pytorch_lightning",
        "lightning",
        "models",
        "data",
        "simulation",
        "cli",
    )
    for module in MODULES:
        if within(module, *rooms("server", "backends")):
            for found in IMPORTS[module]:
                assert not within(found.module, *forbidden, *LIGHTNING), f"{module} imports {found.module}"


def test_not_even_through_others() -> None:
    def reached(module: str, seen: set[str]) -> set[str]:
        for found in IMPORTS.get(module, []):
            if not found.typing and found.module not in seen:
                seen.add(found.module)
                reached(found.module, seen)
        return seen

    for module in MODULES:
        if within(module, *rooms("server", "backends")):
            for found in reached(module, set()) - {NAME}:
                assert not within(found, *rooms("privacy", "participant"), *LIGHTNING), f"{module}: {found}"


def test_few_rooms_know_lightning() -> None:
    allowed = rooms(
        "plugin",
        "pytorch_lightning",
        "lightning",
        "models",
        "simulation",
        "participation",
        "trainer_arguments",
        "metrics_file",
        "cli",
    )
    knowing = {module for module in MODULES if third_party(module) & LIGHTNING}
    assert {module for module in knowing if not within(module, *allowed)} == set()
    assert set(rooms("pytorch_lightning", "lightning", "plugin.rounds")) <= knowing


def test_each_of_lightnings_packages_is_imported_for_its_own_classes_alone() -> None:
    """Its users need not have the other one, and nothing of ours is bound to either."""
    for module in MODULES:
        if within(module, *rooms("plugin", "lightning")):
            needed = {found.module.partition(".")[0] for found in IMPORTS[module] if not found.typing}
            of_lightning = needed & LIGHTNING
            assert of_lightning == ({"lightning"} if module == f"{NAME}.lightning" else set()), module


def test_privacy_needs_torch_numpy_and_its_extras() -> None:
    may = rooms("privacy", "selection", "errors", "validation", "randomness", "records", "database")
    for module in MODULES:
        if within(module, *rooms("privacy")):
            extras = {extra for extra, users in EXTRAS.items() if module in users}
            assert third_party(module) <= {"torch", "numpy"} | extras, module
            for found in IMPORTS[module]:
                assert not within(found.module, NAME) or within(found.module, *may), f"{module}: {found}"


def test_records_and_errors_are_free_of_frameworks() -> None:
    assert third_party(f"{NAME}.records") == {"numpy"}
    assert third_party(f"{NAME}.errors") == set()


def test_hydra_stays_with_the_command_line() -> None:
    for module in MODULES:
        if third_party(module) & {"hydra", "omegaconf"}:
            assert within(module, *rooms("cli", "config")), module


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_optional_extra_is_imported_in_one_file(extra: str) -> None:
    assert {module for module in MODULES if extra in third_party(module)} == EXTRAS[extra]


def find_circle(graph: dict[str, list[Import]]) -> list[str]:
    """A path of imports that comes back to where it began, empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for found in graph.get(module, []):
            if not (found.lazy or found.typing) and (circle := visit(found.module, [*path, module])):
                return circle
        done.add(module)
        return []

    return next((circle for module in graph if (circle := visit(module, []))), [])


def test_no_circle_of_imports() -> None:
    assert find_circle(IMPORTS) == []


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    """The control: relative, nested, guarded and plain imports are all found, and so is a circle."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "sub" / "__init__.py").write_text("from .one import x\n")
    (tmp_path / "sub" / "one.py").write_text(
        "from typing import TYPE_CHECKING\nimport torch.nn as nn\nfrom .. import top\nfrom ..top import y\n"
        "if TYPE_CHECKING:\n    from toy.late import z\ndef f():\n    import grpc\n"
    )
    (tmp_path / "top.py").write_text("try:\n    from toy.sub import one\nexcept ImportError:\n    pass\n")
    (tmp_path / "late.py").write_text("class A:\n    import lightning\n")
    known = modules(tmp_path, "toy")
    assert set(known) == {"toy", "toy.sub", "toy.sub.one", "toy.top", "toy.late"}
    graph = {module: imports(module, known) for module in known}
    assert graph["toy.sub"] == [Import("toy.sub.one", False, False)]
    assert graph["toy.sub.one"] == [
        Import("typing", False, False),
        Import("torch.nn", False, False),
        Import("toy.top", False, False),
        Import("toy.top", False, False),
        Import("toy.late", False, True),
        Import("grpc", True, False),
    ]
    assert graph["toy.late"] == [Import("lightning", False, False)]
    assert set(find_circle(graph)) == {"toy.sub.one", "toy.top"}


def in_a_fresh_interpreter(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_is_cheap() -> None:
    code = (
        f"import sys, {NAME}; "
        "print(*sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'torch', 'numpy', 'pytorch_lightning', 'lightning', 'hydra', 'grpc', 'redis', 'ray'}))"
    )
    assert in_a_fresh_interpreter(code) == ""


def test_the_records_and_errors_can_be_had_without_torch() -> None:
    code = f"import sys, {NAME}.records, {NAME}.errors, {NAME}.wire; print('torch' in sys.modules)"
    assert in_a_fresh_interpreter(code) == "False"


def test_every_public_name_resolves() -> None:
    assert len(set(lightning_ppdl.__all__)) == len(lightning_ppdl.__all__)
    for name in lightning_ppdl.__all__:
        assert getattr(lightning_ppdl, name) is not None
        assert name in dir(lightning_ppdl)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = lightning_ppdl.no_such_thing
