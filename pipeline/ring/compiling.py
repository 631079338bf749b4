"""Kernels are compiled by processes that end, before a ring takes its memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from pipeline.config import Config
from pipeline.launch import module_command, module_environment
from pipeline.ring.memory import proportional_bytes
from pipeline.ring.plan import Plan
from pipeline.status import duration, telling
from storage.store import Store

COMPILER = "workers.compute.compiling"
PATIENCE = 1800.0  # seconds; two minutes on two busy cores
LOOK = 0.1  # seconds between looks at the memory that is taken


class MissingKernels(Exception):
    """A worker would have to compile, and may not."""


def compile_kernels(store: Store, config: Config, plan: Plan) -> int:
    """Compile what the ring's workers will load; returns the most memory that all took meanwhile, in bytes.

    Where that fails nothing is said: the workers then compile by themselves, and tell what is wrong.
    """
    devices = {store.path: config.compute.device}
    if config.drafts.kind == "model":
        devices[Path(config.drafts.model)] = "cpu"
    choices = (plan.cache_dtype, config.compute.activations, plan.forecast.kind)
    progress = Progress()
    with telling(progress.text):
        return max(_compile(path.resolve(), (*choices, device), progress) for path, device in devices.items())


class Progress:
    """How far the compiler says it is: lines of a number and the number of all."""

    def __init__(self) -> None:
        self._began, self._part = time.monotonic(), ""

    def heard(self, lines: bytes) -> None:
        """Something that the compiler wrote; empty for nothing."""
        if words := lines.split(b"\n")[-2:-1]:
            number, total = words[0].decode().split()
            self._part = f" part {number} of {total},"

    def text(self) -> str:
        taken = duration(time.monotonic() - self._began)
        return f"compiling kernels for this machine and these weights, once:{self._part} {taken} so far"


def _compile(store: Path, choices: tuple[str, ...], progress: Progress) -> int:
    with subprocess.Popen(
        module_command(COMPILER, str(store), *choices),
        env=module_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,  # the terminal's Ctrl-C reaches the supervisor alone
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        peak, deadline = 0, time.monotonic() + PATIENCE
        try:
            while process.poll() is None and time.monotonic() < deadline:
                peak = max(peak, proportional_bytes([os.getpid(), process.pid, *_children(process.pid)]))
                with contextlib.suppress(BlockingIOError):
                    progress.heard(os.read(process.stdout.fileno(), 4096))
                time.sleep(LOOK)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return peak


def _children(pid: int) -> list[int]:
    """Empty for a process that has gone, and on systems without /proc."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
