"""Imports point one way, stay small, and do nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {"storage": {"pipeline", "workers", "run"}, "pipeline": {"workers", "run"}, "workers": {"run"}}
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
    """Top-level names of all imports, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(package)
        for name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if name in FORBIDDEN[package]
    ]
    assert found == []


def test_the_check_sees_imports_inside_functions() -> None:
    assert list(imported(ast.parse("def f():\n    from workers.cache import x"))) == ["workers"]


def modules(folder: str) -> list[str]:
    names = []
    for file in sources(folder):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


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
