"""How much memory the machine has to give, whoever else limits it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# In a cgroup's directory: its limit, what it uses, and the line of memory.stat with the cached files in that,
# which the kernel drops before it kills. Version 2 and version 1.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes() -> int:
    """What can be had without swapping, and within every limit of this process's memory cgroups."""
    return max(0, min((int(psutil.virtual_memory().available), *cgroup_rooms(MEMBERSHIP, CGROUPS))))


def cgroup_rooms(membership: Path, root: Path) -> list[int]:
    """Bytes that each cgroup with a limit leaves, from this process's own up to the root.

    `membership`: the process's `/proc/PID/cgroup`; `root`: where the hierarchies are mounted. A container may
    be told the path that its host knows, while it sees only its own cgroup, mounted as the root.
    """
    rooms = []
    with contextlib.suppress(OSError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                base, files = root / "memory", V1
            elif not controllers:
                base, files = root, V2
            else:
                continue
            own = base / path.lstrip("/")
            places = [own, *own.parents]
            for place in places[: places.index(base) + 1]:
                room = _room(place, *files)
                if room is not None:
                    rooms.append(room)
    return rooms


def _room(group: Path, limit: str, usage: str, cached: str) -> int | None:
    """None for a group that has no limit, or is not seen from here."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - int((group / usage).read_text()) + int(statistics.get(cached, 0))
    except (OSError, ValueError):
        return None
