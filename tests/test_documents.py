"""The files and modules that documents and docstrings name are there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {"venv"}  # of Python's own, which `python -m` runs, too
FOREIGN = {"modeling_opt.py", "modeling_falcon.py"}  # of transformers

PATH = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py)`")
MODULE = re.compile(r"python\s+-m\s+([a-z_]+(?:\.[a-z_]+)*)\b(?!\.)")  # not workers.NAME
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")

DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "pipeline/**/*.md", "storage/**/*.md", "workers/**/*.md")
    for file in ROOT.glob(pattern)
)
SOURCES = sorted(file for top in ("pipeline", "storage", "workers") for file in (ROOT / top).rglob("*.py"))


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def docstrings(file: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return "\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))


def missing_files(text: str, file: Path) -> list[str]:
    """Paths in backquotes that lead nowhere, from the root or from a folder on the way to `file`."""
    places = [parent for parent in file.parents if parent.is_relative_to(ROOT)]
    return [
        path
        for path in PATH.findall(text)
        if path not in FOREIGN and not any((place / path).exists() for place in places)
    ]


def missing_modules(text: str) -> list[str]:
    """What `python -m` could not run: no module, or a package without `__main__`."""
    return [module for module in MODULE.findall(text) if module not in OTHERS and not runs(module)]


def runs(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    if found is not None and found.submodule_search_locations is not None:
        return importlib.util.find_spec(f"{module}.__main__") is not None
    return found is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert missing_files(text, document) == []
    assert missing_modules(text) == []
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []


def test_what_docstrings_name_exists() -> None:
    missing = [
        f"{name(file)} names {path}"
        for file in SOURCES
        for text in [docstrings(file)]
        for path in (*missing_files(text, file), *missing_modules(text))
    ]
    assert missing == []


def test_the_check_sees_what_is_missing() -> None:
    text = "`run.py`, `pipeline/gone.py`, `python -m workers.gone`, `python -m workers.lab`, `python -m venv`"
    assert missing_files(text, ROOT / "README.md") == ["pipeline/gone.py"]
    assert missing_modules(text) == ["workers.gone", "workers.lab"]
