"""Running what is measured: child processes, within a memory cgroup where there can be one, caches cold."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.launch import ROOT, module_command, module_environment
from storage.errors import FlashringError
from workers.lab.bench.cgroup import CgroupUnavailable, MemoryCgroup

MOST_WORDS = 200  # characters of a failure's reason
CHILD_SECONDS = 3600.0  # the longest that one child may take
END_SECONDS = 5.0  # and to end when it is told to
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class ChildFailed(FlashringError):
    """A measured program that did not end well; the text is its last words."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a child printed, and what the kernel says about it."""

    result: dict[str, Any]
    peak_bytes: int | None  # of its cgroup; None without one, and where the kernel does not tell
    limited: bool  # it ran within a cgroup of the budget
    cold: bool  # the page cache was empty at its start


def run_main(arguments: Sequence[str], limit: int | None = None) -> Ran:
    """`run.py ARGUMENTS --json`."""
    return run([sys.executable, str(ROOT / "run.py"), *arguments, "--json"], limit)


def run_module(module: str, arguments: Sequence[str], limit: int | None = None) -> Ran:
    """`python -m MODULE ARGUMENTS`."""
    return run(module_command(module, *arguments), limit)


def run(command: list[str], limit: int | None = None, environment: dict[str, str] | None = None) -> Ran:
    """Run a command that prints one JSON object, within a cgroup of `limit` bytes if that can be.

    Raises ChildFailed.
    """
    cold = drop_caches()
    with contextlib.ExitStack() as stack:
        group = None
        if limit is not None:
            with contextlib.suppress(CgroupUnavailable):
                group = stack.enter_context(MemoryCgroup(limit))
        line = group.command(command) if group is not None else command
        done = _run_to_its_end(line, environment or module_environment())
        peak = group.peak_bytes if group is not None else None
    if done.returncode:
        raise ChildFailed(_last_words(done))
    try:
        result = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as error:
        raise ChildFailed(f"{command[0]} printed no result: {done.stdout[-200:]!r}") from error
    return Ran(result, peak, group is not None, cold)


def _run_to_its_end(line: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    with subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            out, words = process.communicate(timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired as error:
            _end(process)
            raise ChildFailed(f"no result within {CHILD_SECONDS:.0f} s") from error
        except BaseException:
            _end(process)
            raise
    return subprocess.CompletedProcess(line, process.returncode, out, words)


def _end(process: subprocess.Popen[str]) -> None:
    """Let a child close what it has opened, such as its ring; kill one that does not."""
    process.terminate()
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    how = "killed, as by the memory limit" if done.returncode in (-9, 137) else f"status {done.returncode}"
    words = done.stderr.strip().splitlines()
    return f"{how}: {words[-1].removeprefix('flashring: ')[:MOST_WORDS]}" if words else how


@contextlib.contextmanager
def load(dtype: str, threads: int) -> Iterator[None]:
    """Keep the kernels and the memory busy in another process meanwhile; 0 `threads`: as many as cores."""
    line = ["--load", "--bytes", str(256 << 20), "--dtype", dtype, "--threads", str(threads)]
    with subprocess.Popen(
        module_command("workers.lab.bench.bandwidth", *line),
        env=module_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise ChildFailed("the kernels that should run meanwhile did not start")
            yield
        finally:
            process.stdin.close()
            process.wait()


def drop_caches() -> bool:
    """Empty the page cache; False where that is not allowed."""
    try:
        os.sync()
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True
