"""What a machine refuses, in words: the limit that was met, and what raises it."""

from __future__ import annotations

import errno

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


def refused(error: OSError, what: str) -> RingError:
    """Of an error of the system's while it should give us `what`."""
    known = LIMITS.get(error.errno or 0)
    return RingError(f"{what} could not be had: {known or reason(error)}")


def explained(words: str) -> str:
    """A worker's last words, with the limit that they are about where they are about one."""
    found = next((limit for said, limit in SAID.items() if said in words), None)
    return f"{words} ({found})" if found else words
