"""How many threads there are, and how many 0 stands for."""

from __future__ import annotations

import os


def cores() -> int:
    """CPUs that this process may run on: `taskset` and cpusets leave fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(wanted: int) -> int:
    """Threads for `wanted`: 0 is one a core, and there are never more than that."""
    return min(wanted, cores()) if wanted else cores()
