"""What the workers find on this machine, asked in a process of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.doctor.finding import Finding
from pipeline.launch import ask_module
from pipeline.status import waiting

ABILITIES: Final = "workers.probe.abilities"
PATIENCE: Final = 180.0  # seconds: a kernel may have to be compiled


def ask(directory: Path) -> dict[str, Any]:
    """What the program says; {"failed": why} where it does not."""
    try:
        with waiting("looking at this machine"):
            done = ask_module(ABILITIES, str(directory), seconds=PATIENCE)
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {PATIENCE:.0f} s"}
    except ValueError:
        words = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return {"failed": words[0]}
    return found


def findings(said: Mapping[str, Any]) -> list[Finding]:
    """As people and programs are told them."""
    if "failed" in said:
        return [
            Finding(
                "workers",
                "broken",
                f"they do not start: {said['failed']}",
                "Nothing runs.",
                "Install flashring again into a fresh environment, with -c constraints.txt.",
            )
        ]
    return [_reads(said), _registered(said), _direct(said), _instructions(said), _kernels(said)]


def _reads(said: Mapping[str, Any]) -> Finding:
    if not said["io_uring"]:
        return Finding("io_uring", "fine", "there")
    return Finding(
        "io_uring",
        "less",
        said["io_uring"],
        "Threads read instead, at about nine tenths of the rate and twice the processor time a read.",
        "Linux 5.5 or newer has it; in a container allow the io_uring calls (seccomp), on a host set "
        "kernel.io_uring_disabled to 0.",
    )


def _registered(said: Mapping[str, Any]) -> Finding:
    if said["io_uring"]:
        return Finding("registered buffers", "told", "not without io_uring")
    if not said["registered"]:
        return Finding(
            "registered buffers", "fine", f"{said['registered_bytes'] >> 20} MiB could be registered"
        )
    return Finding(
        "registered buffers",
        "less",
        said["registered"],
        "The kernel pins pages anew for every read: 1.5 µs of processor time more for each.",
        "Raise `ulimit -l` above the slots of all rings, or give the process CAP_IPC_LOCK.",
    )


def _direct(said: Mapping[str, Any]) -> Finding:
    alignment = said["alignment"]
    if said["direct"] == "direct I/O":
        known = f"multiples of {alignment} bytes" if alignment else "there; the system names no alignment"
        return Finding("direct I/O", "fine", known)
    return Finding(
        "direct I/O",
        "less",
        said["direct"],
        "Reads go through the page cache, which counts in a container's limit and takes memory from slots.",
        "Put the stores on a file system that has O_DIRECT, such as ext4 or xfs: FLASHRING_HOME moves them.",
    )


def _instructions(said: Mapping[str, Any]) -> Finding:
    there = ", ".join(said["features"]) or "none of those that help"
    if said["machine"] in ("x86_64", "AMD64") and "AVX2" not in said["features"]:
        return Finding(
            "instructions",
            "less",
            there,
            "Kernels use what every processor has: weights in eight and four bits take several times longer.",
            "In a virtual machine pass the host's processor through; else 16 bits are the quicker form here.",
        )
    return Finding("instructions", "fine", there)


def _kernels(said: Mapping[str, Any]) -> Finding:
    if said["compiled"]:
        return Finding(
            "kernels",
            "broken",
            said["compiled"],
            "Nothing can be computed.",
            "Install the pinned numba and llvmlite: pip install -c constraints.txt -e .",
        )
    return Finding("kernels", "fine", said["kernels"])
