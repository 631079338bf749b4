"""Under which conditions a bench ran: what a reader needs to believe, or to repeat, its numbers."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.cores import cores
from pipeline.version import version
from workers.lab.bench.cgroup import CgroupUnavailable, MemoryCgroup
from workers.lab.bench.children import DROP_CACHES

PACKAGES = ("flashring", "numpy", "numba", "torch", "pyzmq", "msgpack", "uvloop", "aiofiles")


def take(path: Path) -> dict[str, Any]:
    """The machine, and what it does besides, now. `path` is on the disk that is measured."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": psutil.virtual_memory().available,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file_system": _file_system(path),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "load_average": list(os.getloadavg()),
        "busy_share": psutil.cpu_percent(0.5) / 100,  # of all cores, before anything of ours runs
        "caches_dropped": os.access(DROP_CACHES, os.W_OK),
        "cgroup": cgroup_obstacle() or "memory",
    }


def caveats(conditions: dict[str, Any]) -> list[str]:
    """What makes these conditions less than they should be, one sentence each."""
    found = []
    if not conditions["caches_dropped"]:
        found.append("The page cache could not be emptied between runs (that needs root).")
    if conditions["cgroup"] != "memory":
        found.append(f"Budgets were not enforced by a cgroup: {conditions['cgroup']}.")
    if conditions["busy_share"] > 0.1:
        found.append(
            f"Other programs kept {conditions['busy_share']:.0%} of the cores busy when the run began."
        )
    return found


def cgroup_obstacle() -> str:
    """Why there can be no memory cgroup; empty if there can."""
    try:
        with MemoryCgroup(1 << 30):
            return ""
    except CgroupUnavailable as reason:
        return str(reason)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _file_system(path: Path) -> str:
    """Type and device of the file system that holds `path`."""
    best = max(
        (part for part in psutil.disk_partitions(all=True) if _holds(part.mountpoint, path.resolve())),
        key=lambda part: len(part.mountpoint),
        default=None,
    )
    return f"{best.fstype} on {best.device}" if best else "unknown"


def _holds(mountpoint: str, path: Path) -> bool:
    return path.is_relative_to(mountpoint)
