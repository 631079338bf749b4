"""What a test may leave behind by mistake: processes, threads, descriptors, shared memory, directories."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

PATIENCE = 2.0  # seconds that something which is already ending gets to end
SHARED_MEMORY = Path("/dev/shm")
SOCKET_DIRECTORIES = "flashring-*"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What exists at one moment."""

    children: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    descriptors: frozenset[str]  # sockets and memfds of this process
    shared: frozenset[str]  # names in /dev/shm
    directories: frozenset[str]  # ring directories in the temporary directory


def take() -> Snapshot:
    return Snapshot(
        children=frozenset(psutil.Process().children(recursive=True)),
        threads=frozenset(threading.enumerate()),
        descriptors=frozenset(_descriptors()),
        shared=frozenset(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else frozenset(),
        directories=frozenset(str(path) for path in Path(tempfile.gettempdir()).glob(SOCKET_DIRECTORIES)),
    )


def since(before: Snapshot) -> list[str]:
    """Everything that exists now and did not then, each as a few words."""
    gc.collect()
    after = take()
    if after.children - before.children:
        psutil.wait_procs(after.children - before.children, timeout=PATIENCE)
    for thread in after.threads - before.threads:
        if thread is not threading.current_thread():
            thread.join(PATIENCE)
    after = take()
    return sorted(
        [
            *(f"process {_command(child)}" for child in after.children - before.children),
            *(f"thread {thread.name}" for thread in _ours(after.threads - before.threads)),
            *(f"descriptor {name}" for name in after.descriptors - before.descriptors),
            *(f"/dev/shm/{name}" for name in after.shared - before.shared if not _foreign(name)),
            *(f"directory {path}" for path in after.directories - before.directories),
        ]
    )


def _descriptors() -> Iterable[str]:
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:  # the listing's own descriptor
            continue
        if target.startswith(("socket:", "/memfd:")):
            yield f"{entry} {target}"


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return str(process.pid)


def _ours(threads: Iterable[threading.Thread]) -> Iterable[threading.Thread]:
    """Without tqdm's monitor, which transformers starts once and for all."""
    return (thread for thread in threads if type(thread).__name__ != "TMonitor")


def _foreign(name: str) -> bool:
    """Whether a process that is not of this test run holds the shared memory."""
    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.pids():
        try:
            if process not in family and f"/dev/shm/{name}" in Path(f"/proc/{process}/maps").read_text():
                return True
        except OSError:
            continue
    return False
