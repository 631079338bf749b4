"""Being scheduled soon after waking: a layer waits for threads that run for microseconds at a time, next to
computation that fills every core.

Where all cores were busy, this doubled what the prefetcher read per second. The threads that carry a layer's
messages (`channel.py`) were without a core for 60 to 160 µs of each layer less.

Where there are two cores, these threads share one. They rarely run at the same time, and one that wakes
another on its own core need not interrupt the other core: that took a sixth off what they need of the cores,
and a tenth off the time from a layer's announcement to its last read. Computation uses both cores, and gives
way on one: the thread that launches it keeps to the other, since whoever helps it may be late, and it may
not. Announcing a layer took it 85 µs instead of 590, which was a twentieth of a token (MiniCPM-S's shape,
three runs each in turn: 140 and 133 ms).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}  # system call numbers
NICE = -10
SLICE_NANOSECONDS = 100_000  # the least there is: a short turn comes earlier (Linux 6.12, EEVDF)
FEW_CORES = 2  # with more of them nothing was measured, and every thread runs where it finds room


def be_prompt() -> bool:
    """Ask for short, early turns for this thread and those it will start; False if that is refused.

    Higher priority needs a privilege, a short time slice does not; older kernels ignore the latter.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    os.sched_setaffinity(0, shared_core(os.sched_getaffinity(0)))
    now = os.getpriority(os.PRIO_PROCESS, 0)
    return any(_set(number, nice, SLICE_NANOSECONDS) for nice in (min(NICE, now), now))


@contextmanager
def starting_prompt_threads() -> Iterator[None]:
    """The threads that are started meanwhile are prompt, this one is not."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    prompt = be_prompt()
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        if prompt:
            _set(SCHED_SETATTR[platform.machine()], before, 0)  # 0: the kernel's own slice


def shared_core(cores: set[int]) -> set[int]:
    """Where prompt threads may run, of the cores that this process may use: one of two, or all of them.

    The last one: Linux gives the first more of its own work.
    """
    return {max(cores)} if len(cores) == FEW_CORES else cores


def _set(number: int, nice: int, slice_nanoseconds: int) -> bool:
    # struct sched_attr: size, policy (SCHED_OTHER), flags, nice, priority, runtime, ...
    attributes = struct.pack("<IIQiIQQQII", 56, 0, 0, nice, 0, slice_nanoseconds, 0, 0, 0, 0)
    status: int = ctypes.CDLL(None).syscall(number, 0, attributes, 0)
    return status == 0
