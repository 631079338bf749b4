"""Faults of what is around a ring: stores that are replaced or shared, signals, disks, paths, clocks.

docs/faults.md has them all in one table, also those that other files test; every test that it names exists.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ring
from checkpoints import write_checkpoint
from damage import flip
from ring import config, plan_for

from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import DamagedStore, StoreError
from storage.store import Store
from storage.verify import verify

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0  # seconds until a hang counts as one
CONFIG = config(storage={"verify": "always"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("around") / "model", "opt", "float16")


@pytest.fixture(scope="module")
def store(model: Path) -> Store:
    return convert(model, model.parent / "store", name="tiny")


@pytest.fixture(scope="module")
def text(store: Store) -> ring.Outcome:
    return ring.outcome(store, CONFIG)


# -- the table ------------------------------------------------------------------------------------


def test_every_test_of_the_table_exists() -> None:
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    faults = table.partition("## Workers and signals")[2]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", table)
    assert len(rows) >= 50
    assert all("test_" in row for row in rows)
    known: dict[str, set[str]] = {}
    for file, test in named:
        if file not in known:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            known[file] = {node.name for node in tree.body if isinstance(node, functions)}
        assert test in known[file], f"{file}.py has no {test}"


# -- stores ---------------------------------------------------------------------------------------


def test_a_byte_flipped_in_any_region_of_any_file_is_found(store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.path, tmp_path / "store"))
    for name in sorted(path.name for path in copy.iterdir() if path.is_file()):
        size = (copy / name).stat().st_size
        for offset in sorted({0, 9, size // 3, size // 2, size - 1} & set(range(size))):
            flip(copy / name, offset, bit=0)
            with pytest.raises(StoreError):
                verify(copy)
            flip(copy / name, offset, bit=0)
    verify(copy)


@pytest.mark.ring
def test_a_store_that_is_replaced_while_in_use(
    store: Store, text: ring.Outcome, model: Path, tmp_path: Path
) -> None:
    """What runs goes on with the files that it has open; a ring that starts later refuses the other store."""
    used = Store.open(Path(shutil.copytree(store.path, tmp_path / "store")))
    other = convert(
        write_checkpoint(tmp_path / "other", "opt", "float16", seed=1), tmp_path / "new", name="b"
    )
    plan = plan_for(used, CONFIG)
    with Session(used, CONFIG, plan) as session:
        os.rename(used.path, tmp_path / "old")
        os.rename(other.path, used.path)
        assert ring.generate(session) == text
    with pytest.raises(DamagedStore, match="was replaced by another store while it was in use"):
        Session(used, CONFIG, plan)


@pytest.mark.ring
def test_two_runs_on_one_store(store: Store, text: ring.Outcome) -> None:
    plan = plan_for(store, CONFIG)
    with Session(store, CONFIG, plan) as first, Session(store, CONFIG, plan) as second:
        assert ring.generate(second) == text
        assert ring.generate(first) == text


@pytest.fixture
def odd_place() -> Iterator[Path]:
    """A directory on tmpfs whose path has spaces, letters of other scripts, and 200 characters."""
    top = Path(f"/dev/shm/flashring test {os.getpid()}")
    path = top / "weiß 店 'q\" $x" / ("long " * 40)[:200].strip()
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(top)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
@pytest.mark.ring
def test_a_store_on_tmpfs_under_an_odd_path(store: Store, text: ring.Outcome, odd_place: Path) -> None:
    copy = Store.open(Path(shutil.copytree(store.path, odd_place / "store")))
    with Session(copy, CONFIG, plan_for(copy, CONFIG)) as session:
        assert ring.generate(session) == text
        said = " ".join(session.ring.notes)
    assert "direct I/O" in said or "through the page cache, because" in said


MOUNTS = {  # each puts the store $2 at $1/store, in a name space of its own
    "read-only": 'mount -t tmpfs tmpfs "$1" && cp -r "$2" "$1/store" && mount -o remount,ro "$1"',
    "overlay": 'mount -t tmpfs tmpfs "$1" && mkdir "$1/up" "$1/work" "$1/store" && '
    'mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/up,workdir=$1/work" "$1/store"',
    "full": 'mount -t tmpfs -o size=4m tmpfs "$1" && cp -r "$2" "$1/store" && '
    '{ cat /dev/zero > "$1/filled" 2> /dev/null || true; }',
}


@pytest.mark.ring
@pytest.mark.parametrize("kind", MOUNTS)
def test_a_store_on_a_disk_that_is_read_only_full_or_an_overlay(
    store: Store, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "mount"
    place.mkdir()
    run = [sys.executable, str(ROOT / "run.py"), "--model", str(place / "store"), "--prompt", "Once"]
    run += ["--max-new-tokens", "4", "--ignore-eos", "--set", "compute.threads=1", "--json"]
    script = f'{MOUNTS[kind]} || exit 77; shift 2; exec "$@"'
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare")
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", script, "sh", str(place), str(store.path), *run],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount may be made here")
    assert done.returncode == 0, done.stderr
    assert '"tokens"' in done.stdout


# -- signals --------------------------------------------------------------------------------------


def _workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []


@pytest.mark.ring
@pytest.mark.parametrize("stage", ["packages", "workers", "text"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_at_any_stage_twice(number: signal.Signals, stage: str) -> None:
    """While packages load, while workers start, in mid-text: one sentence at most, and nobody is left."""
    line = [sys.executable, str(ROOT / "run.py"), "--prompt", "Once", "--ignore-eos"]
    line += ["--max-new-tokens", "500", "--set", "compute.threads=1"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + PATIENCE
        assert process.stdout is not None
        if stage == "workers":
            while not _workers(process) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
        elif stage == "text":
            assert process.stdout.read(1)
        left = _workers(process)
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.05)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(left, timeout=PATIENCE)
    assert not alive
    # Before Python has set its handlers up, the signal's own effect ends it.
    assert process.returncode in ((130,) if stage == "text" else (130, 0, 1, -number))
    if stage == "text":
        assert b"Traceback" not in said


INTERRUPTED_WHILE_IT_STOPS = """
import sys
from pathlib import Path
from pipeline.config import Config
from pipeline.ring.supervisor import Supervisor
from storage.store import Store

class Interrupted(Supervisor):
    def stop(self):
        raise KeyboardInterrupt

    def _start(self, *of_the_ring):
        print(self.directory, self.directory.is_dir())
        raise KeyboardInterrupt

try:
    Interrupted(Store.open(Path(sys.argv[1])), Config(), None)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.ring
def test_an_interrupt_before_a_ring_could_stop_leaves_no_directory(store: Store) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IT_STOPS, str(store.path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    )
    directory, there = done.stdout.split()
    assert there == "True"
    assert not Path(directory).exists()


# -- clocks ---------------------------------------------------------------------------------------


def test_no_wait_hangs_on_the_clock_on_the_wall() -> None:
    """A clock that is set back ends no deadline too late: nothing but `time.monotonic` is compared with."""
    wall = []
    for package in ("pipeline", "storage", "workers"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if "lab" not in file.relative_to(ROOT).parts and "builtin" not in file.parts:
                source = file.read_text(encoding="utf-8")
                wall += [str(file.relative_to(ROOT))] if re.search(r"\btime\.time\(\)", source) else []
    told = ["pipeline/serving/http/api.py", "pipeline/serving/openai_answers.py"]  # when an answer was made
    assert wall == told
