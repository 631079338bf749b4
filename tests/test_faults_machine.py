"""What a machine may refuse or do, to a whole command: system calls, limits, memory, clocks, encodings.

The command runs for real where `confined.py`, a cgroup or a name space takes something away. It writes the
text that it writes elsewhere, or says in one sentence what was missing; workers never stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from checkpoints import write_checkpoint
from confined import CANNOT, command

from pipeline.ring.limits import OPEN_FILES
from storage.convert import convert
from storage.store import Store
from workers.lab.bench.cgroup import CgroupUnavailable, MemoryCgroup

pytestmark = pytest.mark.ring

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0  # seconds until a hang counts as one
PROMPT = "Ünë there"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("machine")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="tiny")


def line(store: Store) -> list[str]:
    start = [sys.executable, str(ROOT / "run.py"), "--model", str(store.path), "--prompt", PROMPT, "--json"]
    start += ["-v", "--max-new-tokens", "30", "--ignore-eos", "--set", "compute.threads=1"]
    return [*start, "--set", "cache.share=0.5", "--set", "storage.verify=always"]


def run(command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **settings},
    )
    if done.returncode == CANNOT:
        pytest.skip("this machine does not let itself be confined so")
    return done


def text(done: subprocess.CompletedProcess[str]) -> str:
    """Of a command that has worked."""
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["text"]
    assert isinstance(found, str)
    return found


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Of a command that has failed: the last line, after the plan's and those about the time."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("flashring: ")
    return last


@pytest.fixture(scope="module")
def plain(store: Store) -> str:
    found = text(run(line(store)))
    assert found
    return found


# -- refused system calls, and limits -------------------------------------------------------------

WITHOUT = {  # what is taken away, and what is said of it
    "io_uring=EPERM": "reads by threads, because the kernel refuses io_uring (Operation not permitted)",
    "io_uring=ENOSYS": "reads by threads, because the kernel refuses io_uring (Function not implemented)",
    "memfd=EPERM": "reads by",
    "locked=0": "prefetcher: reads by",  # kernels before 5.12 count the queues, too
    "locked=65536": "buffers not registered (Cannot allocate memory)",
    f"descriptors={OPEN_FILES}": "reads by",
}


@pytest.mark.parametrize("what", WITHOUT)
def test_a_machine_that_refuses_something_writes_the_same_text(store: Store, plain: str, what: str) -> None:
    done = run([*command(what), *line(store)])
    assert text(done) == plain
    assert WITHOUT[what] in done.stderr


@pytest.mark.parametrize("count", [6, 16, OPEN_FILES - 1])
def test_too_few_open_files_are_a_sentence(store: Store, count: int) -> None:
    """Without it a message would not come, for ZeroMQ says nothing."""
    said = sentence(run([*command(f"descriptors={count}"), *line(store)]))
    assert f"needs {OPEN_FILES} open files, and {count} are allowed: see `ulimit -n`" in said


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "nowhere"])
def test_shared_memory_without_room(store: Store, plain: str, tmp_path: Path, disk: bool) -> None:
    """No memfd, and `/dev/shm` has no room for what stands in for it: the disk has, or it is said.

    Memory that was only promised would end its first writer by SIGBUS.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare")
    small = ["/dev/shm"] if disk else ["/dev/shm", str(tmp_path)]
    mounts = "".join(f"mount -t tmpfs -o size=64k tmpfs '{place}' || exit {CANNOT}; " for place in small)
    confined = [*command("memfd=ENOSYS"), *line(store)]
    done = run([unshare, "--mount", "sh", "-c", f'{mounts} exec "$@"', "sh", *confined], TMPDIR=str(tmp_path))
    if "unshare" in done.stderr:
        pytest.skip("no mount may be made here")
    if disk:
        assert text(done) == plain
    else:
        assert "shared memory could not be had: there is no room left" in sentence(done)


PIDS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))  # version 1 and version 2


@pytest.fixture
def few_processes() -> Iterator[Path]:
    """A cgroup in which so many processes and threads as are written into `pids.max` may be."""
    group = next((place for place in PIDS if (place / "cgroup.procs").exists()), PIDS[0])
    group /= f"flashring-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text("max")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no cgroup of processes: {error}")
    yield group
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            break
        time.sleep(0.05)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_too_few_processes_are_a_sentence(store: Store, few_processes: Path, count: int) -> None:
    (few_processes / "pids.max").write_text(str(count))
    script = f'echo $$ > "{few_processes}/cgroup.procs"; exec "$@"'
    said = sentence(run(["sh", "-c", script, "sh", *line(store)]))
    assert "no more processes or threads may be started: see `ulimit -u`, and the cgroup's pids.max" in said
    assert (few_processes / "cgroup.procs").read_text() == ""


# -- memory ---------------------------------------------------------------------------------------


def test_a_cgroup_one_tenth_too_small(store: Store, plain: str) -> None:
    """The kernel ends one of the processes: that is said, or it was the command itself; nobody stays."""
    try:
        with MemoryCgroup(4 << 30) as group:
            assert text(run(group.command(line(store)))) == plain
            peak = group.peak_bytes
        if peak is None:
            pytest.skip("the kernel does not tell a cgroup's peak")
        with MemoryCgroup(peak * 9 // 10) as group:
            done = run(group.command(line(store)))
            left = (group.path / "cgroup.procs").read_text().split()
    except CgroupUnavailable as reason:
        pytest.skip(str(reason))
    if done.returncode != -signal.SIGKILL:
        assert "was killed by SIGKILL: the kernel has ended a process for want of memory" in sentence(done)
    assert not [one for one in left if psutil.pid_exists(int(one))]


# -- clocks and encodings -------------------------------------------------------------------------

BACKWARDS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static long back;  /* seconds; an hour more at each look */

int clock_gettime(clockid_t which, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(which, at);
    if (which == CLOCK_REALTIME) at->tv_sec -= back += 3600;
    return result;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@pytest.fixture
def backwards(tmp_path: Path) -> str:
    """A library under which every look at the clock on the wall finds it an hour further back."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "backwards.c", tmp_path / "backwards.so"
    source.write_text(BACKWARDS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    looks = [sys.executable, "-c", "import time; print(time.time() > time.time() + 3000)"]
    seen = subprocess.run(looks, env={"LD_PRELOAD": str(library)}, capture_output=True, text=True, check=True)
    assert seen.stdout == "True\n"
    return str(library)


def test_a_clock_that_is_set_back(store: Store, plain: str, backwards: str) -> None:
    assert text(run(line(store), LD_PRELOAD=backwards)) == plain


def test_a_locale_without_utf_8(store: Store, plain: str) -> None:
    """The prompt's bytes are those of the command's line, and JSON is JSON, in ASCII."""
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}
    done = run(line(store), **settings)
    assert text(done) == plain
    assert done.stdout.isascii()
