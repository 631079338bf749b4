"""Imports point one way, stay small, and do nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Which packages a floor must not import. `workers/lab` stands above the workers, which know nothing of it.
FORBIDDEN = {
    "storage": ("pipeline", "workers", "run"),
    "pipeline": ("workers", "run"),
    "workers": ("workers.lab", "run"),
    "workers/lab": ("run",),
}
PACKAGES = ("storage", "pipeline", "workers")
LIGHT = ("pipeline", "storage/families", "workers/cache", "workers/prefetcher")
HEAVIER = ("workers.predictor.__main__", "workers.predictor.lowrank", "workers.compute.__main__")  # numba

# Imports the modules named by its arguments, in a fresh interpreter, and tells what came of it.
PROBE = """
import json, os, sys, threading
before = dict(os.environ)
for name in sys.argv[1:]:
    __import__(name)
print(json.dumps({
    "torch": "torch" in sys.modules,
    "threads": [thread.name for thread in threading.enumerate()],
    "environment": {key for key in {*before, *os.environ} if before.get(key) != os.environ.get(key)} == set(),
}))
"""


def sources(package: str) -> list[Path]:
    return sorted(file for file in (ROOT / package).rglob("*.py") if "launcher" not in file.parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """What all imports may name, also those inside functions: modules, and names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return "workers/lab" if parts[:2] == ("workers", "lab") else parts[0]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(package)
        if floor(file) == package
        for name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if any(within(name, forbidden) for forbidden in FORBIDDEN[package])
    ]
    assert found == []


def arrows(file: Path, files: Set[str]) -> set[str]:
    """The files that `file` imports: of a package a submodule, or the package itself."""
    names = set(imported(ast.parse(file.read_text(encoding="utf-8")))) & files
    deeper = {name.rpartition(".")[0] for name in names if name.count(".")}
    return names - deeper - {module(file)}


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {module(file): file for package in PACKAGES for file in sources(package)}
    graph = {name: arrows(file, files.keys()) for name, file in files.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_a_circle_is_seen() -> None:
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_the_check_sees_imports_inside_functions() -> None:
    found = list(imported(ast.parse("def f():\n    from workers.cache import x")))
    assert found == ["workers.cache", "workers.cache.x"]


def module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(folder: str) -> list[str]:
    return [module(file) for file in sources(folder)]


@pytest.mark.parametrize("folder", LIGHT)
def test_no_torch_and_nothing_happens_at_import(folder: str) -> None:
    """All modules of a folder in one interpreter, also each worker's `__main__`."""
    names = modules(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"torch": False, "threads": ["MainThread"], "environment": True}


def test_no_process_of_the_ring_takes_the_memory_that_torch_costs() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *HEAVIER], cwd=ROOT, capture_output=True, check=True)
    assert json.loads(done.stdout)["torch"] is False


@pytest.mark.parametrize("folder", ["pipeline", "storage", "workers"])
def test_modules_say_what_they_are(folder: str) -> None:
    silent = [
        str(file.relative_to(ROOT))
        for file in sources(folder)
        if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert silent == []
