"""Conversions killed anywhere, interrupted twice, or not alone: the store is the same, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from storage.convert import convert
from storage.errors import UsageError
from storage.verify import verify

TESTS = Path(__file__).resolve().parent
PATIENCE = 120.0  # seconds until a hang counts as one
KILLS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("conversions") / "model", "opt", "float16")


@pytest.fixture(scope="module")
def sound(model: Path) -> dict[str, bytes]:
    return contents(convert(model, model.parent / "store", name="x").path)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def forked(act: Callable[[], None]) -> int:
    """What became of a copy of this process that did this and nothing else, as `subprocess` says it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- killed ---------------------------------------------------------------------------------------


def counted(model: Path, out: Path, fatal: int) -> int:
    """Convert, and be killed at this step, a call of any function; 0: never. Returns how many there were."""
    steps = 0

    def step(frame: object, event: str, argument: object) -> None:
        nonlocal steps
        steps += event in ("call", "c_call")
        if steps == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    try:
        convert(model, out, name="x")
    finally:
        sys.setprofile(None)
    return steps


@pytest.fixture(scope="module")
def steps(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a conversion that has read what it imports."""
    return counted(model, tmp_path_factory.mktemp("counted") / "store", 0)


def test_a_conversion_killed_at_20_random_points_resumes(
    model: Path, sound: dict[str, bytes], steps: int, tmp_path: Path
) -> None:
    draw = random.Random(23)
    begun = 0
    for number in range(KILLS):
        out, fatal = tmp_path / f"store-{number}", draw.randint(1, steps)
        assert forked(lambda out=out, fatal=fatal: counted(model, out, fatal)) == -signal.SIGKILL  # type: ignore[misc]
        begun += out.exists() or out.with_name(f"{out.name}.partial").exists()
        assert contents(convert(model, out, name="x").path) == sound
    assert begun > KILLS // 4  # the others had not written anything yet


def test_a_conversion_killed_20_times_resumes(
    model: Path, sound: dict[str, bytes], steps: int, tmp_path: Path
) -> None:
    """All in one directory, each going on from what the last has left."""
    draw, out, killed = random.Random(32), tmp_path / "store", 0
    for _ in range(KILLS):
        fatal = draw.randint(1, steps)
        killed += forked(lambda fatal=fatal: counted(model, out, fatal)) == -signal.SIGKILL  # type: ignore[misc]
    assert killed > KILLS // 4  # a store that is complete is not written again
    assert contents(convert(model, out, name="x").path) == sound
    verify(out)


# -- two at once ----------------------------------------------------------------------------------


def test_two_conversions_into_one_directory(model: Path, sound: dict[str, bytes], tmp_path: Path) -> None:
    """The second comes while the first writes: it is refused, and disturbs nothing."""
    out = tmp_path / "store"
    refused: list[str] = []

    def second(stage: str, done: int, total: int) -> None:
        if not refused:
            refused.append("")
            with pytest.raises(UsageError, match="another conversion") as error:
                convert(model, out, name="x")
            refused[0] = str(error.value)
            assert forked(lambda: _refused(model, out)) == 0

    convert(model, out, name="x", progress=second)
    assert str(out) in refused[0]
    assert contents(out) == sound


def _refused(model: Path, out: Path) -> None:
    """In a process of its own."""
    try:
        convert(model, out, name="x")
    except UsageError:
        return
    raise AssertionError("it was not refused")


# -- interrupted ----------------------------------------------------------------------------------

STAGES = {  # the function in which it is
    "checkpoint": "storage.convert.write.convert_origin",
    "units": "storage.convert.write._bundles",
    "resident weights": "storage.convert.write._resident",
    "manifest": "storage.convert.write.write_whole",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_conversion_interrupted_twice_resumes(
    model: Path, sound: dict[str, bytes], tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    note, out = tmp_path / "note", tmp_path / "store"
    module, _, function = STAGES[stage].rpartition(".")
    line: list[Any] = [sys.executable, TESTS / "slowed.py", note, module, function, "run.py"]
    line += ["convert", model, out]
    with subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + PATIENCE
        while not note.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.02)
        _, told = process.communicate(timeout=PATIENCE)
    # The second may come when the program has said all, and its handlers are gone.
    assert process.returncode in (130, -number), told
    assert b"Traceback" not in told
    assert b"interrupted" in told.splitlines()[-1]
    assert note.read_text() == "[]"  # it was in the middle of that step
    assert contents(convert(model, out, name=model.name).path).keys() == sound.keys()
    verify(out)
