"""The memory budget is kept: a whole run inside a memory cgroup of exactly the budget."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from pipeline.config import Config
from pipeline.planner.divide import plan
from storage.convert import convert
from storage.errors import BudgetError
from storage.store import Store
from workers.lab.bench import cgroup
from workers.lab.bench.cgroup import CgroupUnavailable, MemoryCgroup

ROOT = Path(__file__).resolve().parent.parent


MODELS = {  # checkpoint, bits, and changes that make rows whole groups of four bits
    "sixteen bits": ("opt", None, {}),
    "four bits": ("llama", 4, {"intermediate_size": 256}),
    "a mixture in four bits": ("qwen3-moe", 4, {}),
}


@pytest.fixture(scope="module", params=MODELS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("budget")
    variant, bits, changes = MODELS[request.param]
    checkpoint = write_checkpoint(base / "checkpoint", variant, "float16", changes=changes)
    made = convert(checkpoint, base / "store", name="tiny", bits=bits)
    assert {row.codec for row in made.layout.unit.rows} == {"float16" if bits is None else "q4"}
    return made


def least(store: Store) -> int:
    """The least budget that the planner accepts, in bytes."""
    with pytest.raises(BudgetError, match=r"the least that would do is (\d+)MiB") as refused:
        plan(store, Config.load(None, ['memory.budget="1MiB"']))
    return int(str(refused.value).rsplit(" ", 1)[1].removesuffix("MiB")) << 20


def command(store: Store, budget: int) -> list[str]:
    start = [sys.executable, str(ROOT / "run.py"), "--model", str(store.path), "--prompt", "Once upon"]
    return [*start, "--memory", f"{budget}B", "--json", "--ignore-eos", "--max-new-tokens", "40"]


@pytest.mark.ring
def test_a_run_stays_within_its_budget(store):
    stays_within(store)


def stays_within(store: Store) -> None:
    """Runs in a group of the least memory that the planner accepts. Skips where there are no groups."""
    budget = least(store)
    try:
        group = MemoryCgroup(budget)
    except CgroupUnavailable as reason:
        pytest.skip(str(reason))
    with group:
        done = subprocess.run(
            group.command(command(store, budget)), capture_output=True, text=True, check=False
        )
        peak = group.peak_bytes
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["memory"]["budget_bytes"] == budget
    assert result["generated_tokens"] == 40
    assert 0 < result["memory"]["peak_bytes"] <= budget
    assert peak is None or peak <= budget


def test_a_group_leaves_nothing_behind():
    try:
        group = MemoryCgroup(64 << 20)
    except CgroupUnavailable as reason:
        pytest.skip(str(reason))
    with group, subprocess.Popen(group.command(["sleep", "60"]), stdin=subprocess.DEVNULL) as sleeping:
        while str(sleeping.pid) not in (group.path / "cgroup.procs").read_text().split():
            time.sleep(0.01)
        group.__exit__(None, None, None)
        assert sleeping.wait() == -signal.SIGKILL
    assert not group.path.exists()


def test_a_kernel_that_does_not_tell_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.19, under cgroup v2."""
    monkeypatch.setattr(cgroup, "_controller", lambda: (tmp_path, cgroup._V2))
    group = MemoryCgroup(64 << 20)
    assert group.peak_bytes is None
    (group.path / "memory.peak").write_text("4096\n")
    assert group.peak_bytes == 4096


def test_a_process_beyond_the_cgroup_is_stopped():
    """The measure itself: without this, the test above could not fail."""
    try:
        group = MemoryCgroup(64 << 20)
    except CgroupUnavailable as reason:
        pytest.skip(str(reason))
    with group:
        hog = [sys.executable, "-c", "len(bytearray(256 << 20))"]
        assert subprocess.run(group.command(hog), capture_output=True, check=False).returncode != 0
