"""What a machine refuses, in words: the limit that was met, and what raises it."""

from __future__ import annotations

import errno
import resource
import threading
from pathlib import Path

from storage.errors import RingError, reason

# What systems and libraries say of a limit -> the limit, and what raises it.
PROCESSES = "no more processes or threads may be started: see `ulimit -u`, and the cgroup's pids.max"
DESCRIPTORS = "no more files may be open: see `ulimit -n`"
MEMORY = "the system gives no more memory: see `ulimit -v`, and vm.overcommit_memory"
LIMITS = {
    errno.EAGAIN: PROCESSES,
    errno.EMFILE: DESCRIPTORS,
    errno.ENFILE: "the system has no more open files to give: see fs.file-max",
    errno.ENOMEM: MEMORY,
    errno.ENOSPC: "there is no room left: see `df /dev/shm`, and TMPDIR",
}
SAID = {
    "can't start new thread": PROCESSES,
    "Thread creation failed": PROCESSES,  # OpenMP
    "pthread_create": PROCESSES,
    "Resource temporarily unavailable": PROCESSES,
    "Too many open files": DESCRIPTORS,
    "Cannot allocate memory": MEMORY,
    "failed to map segment from shared object": MEMORY,
}

OPEN_FILES = 64  # that each process of a ring may have; 48 were enough for one reader
THREADS = 4  # ZeroMQ's two, and as many again
VMSTAT = Path("/proc/vmstat")


def check_open_files() -> None:
    """Raises RingError where fewer may be open than a ring needs.

    ZeroMQ does not say that it had no more: a message would only not come.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < OPEN_FILES:
        raise RingError(
            f"each process of a ring needs {OPEN_FILES} open files, and {allowed} are allowed: "
            "see `ulimit -n`"
        )


def check_threads() -> None:
    """Raises RingError where this process cannot start the threads that its sockets need.

    ZeroMQ would abort the process instead.
    """
    ended = threading.Event()
    started = []
    try:
        for _ in range(THREADS):
            thread = threading.Thread(target=ended.wait, name="may-be-started")
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise RingError(f"threads could not be had: {PROCESSES}") from error
    finally:
        ended.set()
        for thread in started:
            thread.join()


def met(error: MemoryError | RuntimeError) -> str:
    """The limit that an error is about, in words; empty: none."""
    if isinstance(error, MemoryError):
        return MEMORY
    return next((limit for said, limit in SAID.items() if said in str(error)), "")


def kills_for_memory() -> int:
    """How often the kernel has ended a process because memory, or a cgroup's, was used up."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text(encoding="ascii").splitlines())
        return int(counters.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def refused(error: OSError, what: str) -> RingError:
    """Of an error of the system's while it should give us `what`."""
    known = LIMITS.get(error.errno or 0)
    return RingError(f"{what} could not be had: {known or reason(error)}")


def explained(words: str) -> str:
    """A worker's last words, with the limit that they are about where they are about one."""
    found = next((limit for said, limit in SAID.items() if said in words), None)
    return f"{words} ({found})" if found else words
