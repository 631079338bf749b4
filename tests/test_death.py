"""Deaths and interrupts of a running command: it ends, says why, and leaves nothing behind.

The command is frozen in mid-generation, so that there is always a generation to interrupt: compute
is stopped (SIGSTOP) as soon as the first text has been printed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from checkpoints import write_checkpoint

from storage.convert import convert

pytestmark = pytest.mark.ring

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ("predictor", "cache", "prefetcher", "compute")
PATIENCE = 20.0  # seconds until a hang counts as one; what it takes is measured elsewhere


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("death")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="tiny").path


def command(store: Path, *arguments: str) -> list[str]:
    start = [sys.executable, str(ROOT / "run.py"), "--model", str(store), "--prompt", "Once"]
    return [*start, "--ignore-eos", "--max-new-tokens", "120", "--set", "compute.threads=1", *arguments]


@contextmanager
def frozen_generation(store: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, psutil.Process]]]:
    """A command in mid-generation, and its workers by name."""
    process = subprocess.Popen(command(store), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.read(1)
        workers = {
            name: child
            for child in psutil.Process(process.pid).children()
            for name in WORKERS
            if f"workers.{name}" in child.cmdline()
        }
        assert set(workers) == set(WORKERS)
        workers["compute"].send_signal(signal.SIGSTOP)
        yield process, workers
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[bytes], workers: dict[str, psutil.Process]) -> tuple[int, str]:
    """Exit status and standard error of a command that has to end now; no worker may be left."""
    _, errors = process.communicate(timeout=PATIENCE)
    _, alive = psutil.wait_procs(workers.values(), timeout=PATIENCE)
    assert not alive
    assert not list(Path(tempfile.gettempdir()).glob(f"flashring-{process.pid}-*"))
    text = errors.decode()
    assert "Traceback" not in text
    return process.returncode, text


@pytest.mark.parametrize("victim", WORKERS)
def test_a_killed_worker_ends_the_command_by_name(store, victim):
    with frozen_generation(store) as (process, workers):
        workers[victim].send_signal(signal.SIGKILL)
        status, errors = ended(process, workers)
    assert status == 1
    assert f"the {victim} worker" in errors
    assert "SIGKILL" in errors


def test_interrupt_ends_the_command_without_a_traceback(store):
    with frozen_generation(store) as (process, workers):
        process.send_signal(signal.SIGINT)
        status, errors = ended(process, workers)
    assert status == 130
    assert errors.splitlines()[-1] == "flashring: interrupted"


def test_no_worker_survives_a_killed_command(store):
    with frozen_generation(store) as (process, workers):
        workers["compute"].send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        ended(process, workers)


def test_the_main_job_prints_one_json_object(store):
    done = subprocess.run(
        command(store, "--json", "--max-new-tokens", "6"), capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["generated_tokens"] == 6
    assert result["prompt_tokens"] > 0
    assert set(result["seconds"]) >= {"load", "prefill", "decode"}
    assert {worker["name"] for worker in result["workers"]} == set(WORKERS)
    assert all(worker["pid"] != os.getpid() for worker in result["workers"])
    assert result["flash"]["bytes_read"] > 0
    assert result["flash"]["reads"] > 0
    assert result["cache"]["slots"] > 0
    assert result["memory"]["peak_bytes"] > 0
    assert result["config"]["predictor"]["kind"] == "all"
    assert len(result["token_seconds"]) == 5


def test_workers_are_not_shadowed_by_the_callers_directory(store, tmp_path):
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(
        command(store, "--max-new-tokens", "2"), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
