"""Evaluation items: files in, (context, choices, gold) out.

Formats, one item a line unless said otherwise, optionally `.xz` or `.bz2`:

- `hellaswag`: six lines an item: context, number of the right ending, four endings
- `arc_easy`, `arc_challenge`, `piqa`: `{"query", "choices", "gold"}`; asked as the harness does
- `lambada`: `{"context", "continuation"}`; right when the continuation is the greedy one
"""

from __future__ import annotations

import bz2
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import UsageError, reason


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `gold` is an index into `choices`; a single choice is judged by greedy match."""

    context: str
    choices: tuple[str, ...]
    gold: int


def read_text(path: Path) -> str:
    """The whole file as UTF-8, unpacked if its name ends in `.xz` or `.bz2`. Raises UsageError."""
    opener: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".bz2": bz2.decompress}
    try:
        data = path.read_bytes()
        unpack = opener.get(path.suffix)
        return (unpack(data) if unpack else data).decode("utf-8")
    except (OSError, lzma.LZMAError, ValueError) as error:  # bz2 and UTF-8 raise ValueErrors
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error


def _hellaswag(lines: list[str]) -> list[Item]:
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are not a multiple of six")
    items = []
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6]
        items.append(Item(context, tuple(f" {ending}" for ending in endings), int(gold)))
    return items


def _choices(record: dict[str, Any]) -> Item:
    context = f"{record['query'].rstrip()}\nAnswer:"
    return Item(context, tuple(f" {choice}" for choice in record["choices"]), int(record["gold"]))


def _lambada(record: dict[str, Any]) -> Item:
    return Item(record["context"].rstrip(), (f" {record['continuation'].strip()}",), 0)


def _each_line(parse: Callable[[dict[str, Any]], Item]) -> Callable[[list[str]], list[Item]]:
    def parse_all(lines: list[str]) -> list[Item]:
        items = []
        for number, line in enumerate(lines, 1):
            try:
                items.append(parse(json.loads(line)))
            except KeyError as error:
                raise ValueError(f"item {number} has no {error}") from error
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"item {number}: {error}") from error
        return items

    return parse_all


TASKS: dict[str, Callable[[list[str]], list[Item]]] = {
    "hellaswag": _hellaswag,
    "arc_easy": _each_line(_choices),
    "arc_challenge": _each_line(_choices),
    "piqa": _each_line(_choices),
    "lambada": _each_line(_lambada),
}


def load(task: str, path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a file. Raises UsageError for an unknown task or a bad file."""
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    try:
        items = TASKS[task](lines)
    except ValueError as error:
        raise UsageError(f"{path} is not a {task} file: {error}") from error
    if not items:
        raise UsageError(f"{path} is not a {task} file: it has no items")
    bad = next((item for item in items if not 0 <= item.gold < len(item.choices)), None)
    if bad is not None:
        raise UsageError(f"{path} is not a {task} file: an answer number is out of range")
    return items[:limit] if limit else items


def find(task: str, directory: Path) -> Path:
    """The file of `directory` whose name begins with the task's. Raises UsageError."""
    found = sorted(directory.glob(f"{task}*"))
    if not found:
        raise UsageError(f"{directory} has no file for the task {task}")
    return found[0]
