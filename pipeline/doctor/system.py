"""What the operating system gives: memory and its limits, disks, versions, places."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import Final

import psutil

from pipeline import directories
from pipeline.console import size
from pipeline.cores import cores
from pipeline.doctor.finding import Finding
from pipeline.planner import machine, rates
from pipeline.planner.devices import probe
from pipeline.version import name_and_version, version
from storage.errors import ConfigError, UsageError

PACKAGES: Final = (
    "numpy",
    "numba",
    "llvmlite",
    "pyzmq",
    "msgpack",
    "uvloop",
    "aiofiles",
    "tokenizers",
    "torch",
)
OPTIONAL: Final = {"torch"}  # for commands that train, and for devices
LEAST_MEMORY: Final = 1 << 30  # bytes: the processes, and the smallest models
LEAST_SPACE: Final = 1 << 30
SLOW_DISK: Final = 0.3e9  # bytes a second of 16 KiB reads
SHARED: Final = Path("/dev/shm")
LARGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def findings() -> list[Finding]:
    return [
        _system(),
        *_versions(),
        _cores(),
        _memory(),
        _cgroup(),
        _locked(),
        _shared(),
        *_large_pages(),
        *_gpus(),
    ]


def _system() -> Finding:
    words = f"{name_and_version()}, {platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() == "Linux":
        return Finding("system", "fine", words)
    return Finding(
        "system",
        "less",
        words,
        "There are no io_uring, no direct I/O and no memory cgroups here: reads are slower, budgets are not "
        "enforced by the kernel.",
        "Run it on Linux where speed matters.",
    )


def _versions() -> list[Finding]:
    python = Finding("python", "fine", sys.version.split()[0])
    found = {name: version(name) for name in PACKAGES}
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    missing = [name for name, number in found.items() if not number]
    if needed := [name for name in missing if name not in OPTIONAL]:
        packages = Finding(
            "packages",
            "broken",
            f"{', '.join(needed)} missing; there are {there}",
            "Nothing runs.",
            "pip install -c constraints.txt -e . in flashring's directory.",
        )
    elif missing:
        packages = Finding(
            "packages",
            "less",
            f"{there}; not {', '.join(missing)}",
            "Predictors cannot be trained, and compute runs on the CPU's own kernels alone.",
            "pip install -c constraints.txt -e . in flashring's directory.",
        )
    else:
        packages = Finding("packages", "fine", there)
    return [python, packages]


def _cores() -> Finding:
    words = f"{rates.processor()}, {cores()} of {os.cpu_count()} cores"
    if cores() > 1:
        return Finding("processor", "fine", words)
    return Finding(
        "processor",
        "less",
        words,
        "Reading and computing take turns on one core.",
        "Give the process a second core (taskset, cpuset, the container's CPUs).",
    )


def _memory() -> Finding:
    available, total = machine.available_bytes(), psutil.virtual_memory().total
    words = f"{size(available)} available of {size(total)}"
    if available >= LEAST_MEMORY:
        return Finding("memory", "fine", words)
    return Finding(
        "memory",
        "less",
        words,
        f"The processes alone take 450 MiB; below {size(LEAST_MEMORY)} only the smallest models run.",
        "End other programs, or raise the container's limit.",
    )


def _cgroup() -> Finding:
    total = psutil.virtual_memory().total  # version 1 calls a number beyond it no limit
    rooms = [one for one in machine.cgroup_rooms(machine.MEMBERSHIP, machine.CGROUPS) if one < total]
    if not rooms:
        return Finding("memory limit", "fine", "no cgroup limits this process")
    return Finding(
        "memory limit",
        "told",
        f"a cgroup leaves {size(min(rooms))}",
        "Without --memory a model that fits well is kept whole within that, page cache included.",
        "Say --memory SIZE below the limit where other programs share it.",
    )


def _locked() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or os.geteuid() == 0:
        words = "unlimited" if soft == resource.RLIM_INFINITY else f"{size(soft)}, which root may exceed"
        return Finding("locked memory", "fine", words)
    return Finding(
        "locked memory",
        "less",
        f"at most {size(soft)}",
        "Slots beyond that are not registered with io_uring, and each read costs 1.5 µs more.",
        "`ulimit -l unlimited`, LimitMEMLOCK=infinity of a service, or --ulimit memlock=-1 of a container.",
    )


def _shared() -> Finding:
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            os.close(os.memfd_create("flashring-doctor"))
            return Finding("shared memory", "fine", "memfd")
    room = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
    if room >= LEAST_MEMORY:
        return Finding("shared memory", "fine", f"{SHARED}, {size(room)} free")
    return Finding(
        "shared memory",
        "less",
        f"no memfd, and {size(room)} in {SHARED}",
        "Slots lie in a temporary file, which the system may write to the disk.",
        "Allow memfd_create, or give the container --shm-size.",
    )


def _large_pages() -> list[Finding]:
    """Of shared memory; nothing where the system knows none."""
    try:
        words = LARGE_PAGES.read_text(encoding="ascii")
    except (OSError, ValueError):
        return []
    chosen = words.partition("[")[2].partition("]")[0]
    if chosen not in ("never", "deny"):
        return [Finding("large pages", "fine", f"of shared memory: {chosen}")]
    return [
        Finding(
            "large pages",
            "less",
            f"of shared memory: {chosen}",
            "A virtual disk fills slots of single pages slower, by a third where they lie in disorder.",
            f"As root: `echo advise > {LARGE_PAGES}`; it lasts until the next start.",
        )
    ]


def _gpus() -> list[Finding]:
    found = []
    for kind, words in (("cuda", "NVIDIA GPU"), ("mps", "Metal GPU")):
        if (kind == "mps") != (platform.system() == "Darwin"):
            continue
        try:
            one = probe(kind)
            found.append(
                Finding(words, "fine", f"{one.name}, {size(one.free)} free: --device {kind} computes there")
            )
        except ConfigError as error:
            found.append(
                Finding(words, "told", str(error).partition(", and ")[2].partition(":")[0] or str(error))
            )
    return found


def places(*, measure: bool) -> list[Finding]:
    """Where caches lie, and the disk below them; with `measure`, how fast it is."""
    home = directories.home()
    there = next(one for one in (home, *home.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    found = [_home(home, there, free), _compiled()]
    file_system = _file_system(there)
    known = None
    with contextlib.suppress(rates.ProbeFailed, UsageError, OSError):
        known = rates.measured(home) if measure else rates.known(home)
    if known is None:
        return [*found, Finding("disk", "told", f"{file_system}; not measured yet, `run.py plan` does")]
    small, large = known.reading(16 << 10), known.reading(1 << 20)
    words = f"{file_system}; {small / 1e9:.2g} GB/s in reads of 16 KiB, {large / 1e9:.2g} of 1 MiB"
    if small >= SLOW_DISK:
        return [*found, Finding("disk", "fine", words)]
    return [
        *found,
        Finding(
            "disk",
            "less",
            words,
            f"Tokens that read from flash wait long: 100 MB a token take {1e8 / small:.1f} s.",
            "Put the stores on an NVMe disk (FLASHRING_HOME), take fewer bits, or more memory.",
        ),
    ]


def _home(home: Path, there: Path, free: int) -> Finding:
    words = f"{home}, {size(free)} free"
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            "stores",
            "broken",
            f"{home} cannot be written",
            "No model can be converted.",
            "Set FLASHRING_HOME to a directory of yours.",
        )
    if free < LEAST_SPACE:
        return Finding(
            "stores",
            "less",
            words,
            "A store takes as much as its model's weights in its bits.",
            "Make room, `run.py stores remove STORE`, or set FLASHRING_HOME to another disk.",
        )
    return Finding("stores", "fine", words)


def _compiled() -> Finding:
    try:
        path, why = directories.kernel_cache()
    except UsageError as error:
        return Finding(
            "compiled kernels", "broken", str(error), "Nothing can be computed.", "Set NUMBA_CACHE_DIR."
        )
    if not why:
        return Finding("compiled kernels", "fine", str(path))
    return Finding(
        "compiled kernels",
        "less",
        f"{path}, since {why}",
        "Kernels are compiled again where this place is lost.",
        "Make the cache writable, or set NUMBA_CACHE_DIR.",
    )


def _file_system(path: Path) -> str:
    """Type and device of the file system that holds a path."""
    inside = [
        part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)
    ]
    best = max(inside, key=lambda part: len(part.mountpoint), default=None)
    return f"{best.fstype} on {best.device}" if best else "an unknown file system"
