"""Every silent wait over five seconds is gone: long commands with a slow step, in a pipe and on a terminal.

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
    dense = write_checkpoint(base / "dense", "llama", "float16")
    convert(dense, base / "dense-store", name="dense")
    convert(write_checkpoint(base / "sparse", "opt", "float16"), base / "sparse-store", name="sparse")
    (base / "text").write_text("one two three four five six seven eight nine ten " * 400)
    return base


def commands(place: Path, out: Path) -> dict[str, Slow]:
    sparse, dense = str(place / "sparse-store"), str(place / "dense-store")
    train = ["--store", sparse, "--text", str(place / "text"), "--method", "svd", "--rank", "4"]
    return {
        "convert": Slow(
            "storage.convert.units",
            "of_layer",
            "run.py",
            ("convert", str(place / "sparse"), str(out / "converted")),
            "converting ",
        ),
        "verify": Slow("storage.verify", "_verify_bundles", "run.py", ("verify", sparse), "verifying "),
        "shadow": Slow("storage.shadow", "_tensors", "run.py", ("shadow", dense), "making the shadow"),
        "synthesize": Slow(
            "workers.lab.synthesis.checkpoint",
            "_write",
            "workers.lab.synthesis",
            ("--shape", "opt-125m", "--out", str(out / "synthetic"), "--layers", "1"),
            "synthesising ",
        ),
        "train-predictor": Slow(
            "workers.lab.training.activations",
            "record",
            "workers.lab.training",
            (*train, "--tokens", "256", "--name", out.name),
            "training ",
        ),
        "a ring's start": Slow(
            "pipeline.ring.supervisor",
            "Supervisor._handshake",
            "run.py",
            ("--model", sparse, "--prompt", "one two", "--max-new-tokens", "2"),
            "is starting",
        ),
    }


def measurements(place: Path, out: Path) -> dict[str, Slow]:
    """Those that import torch, or run many rings, in a pipe alone."""
    sparse, dense, text = str(place / "sparse-store"), str(place / "dense-store"), str(place / "text")
    lab = "workers.lab"
    return {
        "evaluate": Slow(
            f"{lab}.offline.dense",
            "DenseModel.__init__",
            f"{lab}.evaluation",
            ("--model", sparse, "--text", text, "--tokens", "64"),
            "evaluating: ",
        ),
        "calibrate": Slow(
            f"{lab}.evaluation.curve.passes",
            "Passes.run",
            f"{lab}.evaluation.curve.calibrate",
            ("--model", dense, "--text", text, "--quick", "--tokens", "64", "--held-out", "64"),
            "evaluating: ",
        ),
        "relufy": Slow(
            f"{lab}.relufy.train",
            "_step",
            f"{lab}.relufy",
            (
                *(str(place / "dense"), str(out / "relufied"), "--text", text, "--steps", "1"),
                *("--tokens", "32", "--length", "16", "--test-tokens", "32"),
            ),
            "distilling dense: ",
        ),
        "trace record": Slow(
            f"{lab}.offline.record",
            "record",
            f"{lab}.traces",
            ("record", str(out / "trace.npz"), "--model", sparse, "--text", text, "--tokens", "64"),
            "recording: ",
        ),
        "bench": Slow(
            f"{lab}.bench.series",
            "Series.again",
            f"{lab}.bench",
            (
                *("--model", sparse, "--out", str(out / "bench"), "--parts", "ablation", "--row", "hybrid"),
                *("--quick", "--no-plots", "--text", text),
            ),
            "measuring ",
        ),
        "tune": Slow(
            "pipeline.tuning.trial",
            "seconds",
            "run.py",
            (
                *("tune", "--model", sparse, "--minutes", "0.1", "--tokens", "6", "--prompt", "one two"),
                *("--out", str(out / "tuned.toml")),
            ),
            "trial 1: the beginning",
        ),
        "repair": Slow(
            "storage.repair",
            "_Repair.run",
            "run.py",
            ("repair", sparse, "--from", str(place / "sparse")),
            "repairing sparse-store",
        ),
        "doctor": Slow("pipeline.doctor.abilities", "ask_module", "run.py", ("doctor",), "looking at "),
    }


def hear(name: str, slow: Slow, note: Path, terminal: bool) -> tuple[str, Slow, Heard, list[float]]:
    """What a slowed command wrote when, and the moments between which it slept."""
    line = [sys.executable, str(TESTS / "slowed.py"), str(note), slow.module, slow.function, slow.program]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm-256color"}
    heard = listen([*line, *slow.arguments], terminal=terminal, environment=environment)
    return name, slow, heard, json.loads(note.read_text()) if note.exists() else []


@pytest.mark.ring
def test_no_long_command_is_silent_for_long(place: Path, tmp_path: Path):
    """All at once, since they sleep most of the time. Told are the silences while a step sleeps."""
    jobs = []
    with ThreadPoolExecutor(20) as pool:
        for where in ("pipe", "terminal"):
            (tmp_path / where).mkdir()
            slowed = commands(place, tmp_path / where)
            slowed |= measurements(place, tmp_path / where) if where == "pipe" else {}
            for number, (name, slow) in enumerate(slowed.items()):
                note = tmp_path / f"{where}-{number}"
                jobs.append(pool.submit(hear, f"{name}, {where}", slow, note, where == "terminal"))
    for name, slow, heard, slept in (job.result() for job in jobs):
        assert len(slept) == 2, f"{name} never came to its slow step: {heard.text}"
        assert slow.says in heard.text, name
        assert heard.longest(*slept) <= GOAL, f"{name} was silent: {heard.text}"
        assert heard.status == 0, f"{name}: {heard.text}"


def test_the_longest_silence_is_between_signs_of_life():
    assert longest([1.0, 2.5, 9.0], 0.0, 4.0) == 1.5
    assert longest([], 1.0, 4.0) == 3.0
    assert longest([0.5, 3.0], 1.0, 4.0) == 2.0
