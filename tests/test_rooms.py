"""The house: imports between rooms only go down, so that there is no circle; the top level holds rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kfacopt"

# From the ground up. A room may import from those before it, and from itself.
ROOMS = [
    "optional",
    "checkpoints",
    "run_report",
    "schedules",
    "linalg",
    "fsdp",
    "sharding",
    "exchange",
    "replicas",
    "likelihoods",
    "layers",
    "damping",
    "capture",
    "replay",
    "blocks",
    "backends",
    "solvers",
    "operators",
    "optim",
    "lightning",
    "experiments",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ROOMS)
LARGEST = 400


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports at its top level; those inside functions are lazy on purpose."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kfacopt"):
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {module_of(other) for other in FILES}
            found |= (within & modules) or {node.module or ""}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("kfacopt")}
    return found


@pytest.mark.parametrize("path", FILES, ids=[module_of(path) for path in FILES])
def test_imports_only_go_down(path: Path) -> None:
    here = ROOMS.index(module_of(path).split(".")[1])
    for imported in imports_of(path):
        assert imported != "kfacopt", f"{module_of(path)} imports the package itself"
        there = ROOMS.index(imported.split(".")[1])
        assert there <= here, f"{module_of(path)} imports {imported}, which is above it"


def test_there_is_no_circle() -> None:
    graph = {module_of(path): imports_of(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=[module_of(path) for path in FILES])
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LARGEST


def test_the_top_level_holds_rooms() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")}
    top = {
        "__init__",
        "checkpoints",
        "schedules",
        "damping",
        "optional",
        "run_report",
        "sharding",
        "exchange",
        "replicas",
        "fsdp",
    }
    assert files <= top
    # docs/ holds the pages of the documentation and no Python.
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"} <= {*ROOMS, "docs"}
    assert not list((PACKAGE / "docs").rglob("*.py"))


def test_the_import_is_light() -> None:
    heavy = ("pytorch_lightning", "hydra", "wandb", "matplotlib", "sklearn", "scipy", "kfacopt.experiments")
    code = f"import sys, kfacopt; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
