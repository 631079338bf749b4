"""Every silent wait over five seconds is gone: long commands, each with a step that is slow, in pipe and terminal.

By a fake clock `test_status.py` holds the same of what they all say it by.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from storage.convert import convert
from workers.lab.bench.silence import GOAL, Heard, listen, longest

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Slow:
    """A command, and which of its steps is slow."""

    module: str
    function: str
    program: str
    arguments: tuple[str, ...]
    says: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("silence")
    dense = write_checkpoint(base / "dense", "falcon", "float16")
    convert(dense, base / "dense-store", name="dense")
    convert(write_checkpoint(base / "sparse", "opt", "float16"), base / "sparse-store", name="sparse")
    (base / "text").write_text("one two three four five six seven eight nine ten " * 400)
    return base


def commands(place: Path, out: Path) -> dict[str, Slow]:
    text = str(place / "text")
    return {
        "convert": Slow(
            "storage.convert.write", "_layer", "run.py",
            ("convert", str(place / "sparse"), str(out / "converted")), "converting ",
        ),
        "verify": Slow(
            "storage.verify", "_verify_bundles", "run.py", ("verify", str(place / "sparse-store")), "verifying ",
        ),
        "shadow": Slow(
            "storage.shadow", "_tensors", "run.py", ("shadow", str(place / "dense-store")), "making the shadow",
        ),
        "synthesize": Slow(
            "workers.lab.synthesis.checkpoint", "_write", "workers.lab.synthesis",
            ("create", "opt-6.7b", str(out / "synthetic"), "--layers", "1"), "synthesising ",
        ),
        "train-predictor": Slow(
            "workers.lab.training.activations", "record", "workers.lab.training",
            ("--store", str(place / "sparse-store"), "--text", text, "--method", "svd", "--rank", "4",
             "--tokens", "256", "--name", out.name), "training ",
        ),
        "a prompt": Slow(
            "pipeline.ring.supervisor", "Supervisor._start", "run.py",
            ("--model", str(place / "sparse-store"), "--prompt", "one two", "--max-new-tokens", "2"), "",
        ),
    }  # fmt: skip


def hear(name: str, slow: Slow, note: Path, terminal: bool) -> tuple[str, bool, Heard, list[float]]:
    line = [sys.executable, str(TESTS / "slowed.py"), str(note), slow.module, slow.function, slow.program]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm-256color"}
    heard = listen([*line, *slow.arguments], terminal=terminal, environment=environment)
    return name, terminal, heard, json.loads(note.read_text()) if note.exists() else []


def test_the_longest_silence_is_between_signs_of_life():
    assert longest([1.0, 2.5, 9.0], 0.0, 4.0) == 1.5
    assert longest([], 1.0, 4.0) == 3.0
    assert longest([0.5, 3.0], 1.0, 4.0) == 2.0
