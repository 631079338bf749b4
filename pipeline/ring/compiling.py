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
from pipeline.status import waiting
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
    with waiting("compiling kernels for this machine, once"):
        return max(_compile(path.resolve(), (*choices, device)) for path, device in devices.items())


def _compile(store: Path, choices: tuple[str, ...]) -> int:
    process = subprocess.Popen(
        module_command(COMPILER, str(store), *choices),
        env=module_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,  # the terminal's Ctrl-C reaches the supervisor alone
    )
    peak, deadline = 0, time.monotonic() + PATIENCE
    try:
        while process.poll() is None and time.monotonic() < deadline:
            peak = max(peak, proportional_bytes([os.getpid(), process.pid, *_children(process.pid)]))
            time.sleep(LOOK)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return peak


def _children(pid: int) -> list[int]:
    """Empty for a process that has gone, and on systems without /proc."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
