"""How many threads 0 stands for."""

from __future__ import annotations

import os


def cores() -> int:
    """CPUs that this process may run on: `taskset` and cpusets leave fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
