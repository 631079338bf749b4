"""Runs a command on a machine that refuses something: `python confined.py WHAT… -- COMMAND…`.

System calls that a filter (seccomp) answers with an error, as containers and `sysctl` do:

    io_uring=EPERM     no queues of the kernel's; what `kernel.io_uring_disabled` answers, too
    memfd=ENOSYS       no shared memory without a name

Limits: `NAME=VALUE`, of `descriptors`, `locked` (bytes), `memory` (bytes of addresses). They bind root, too.
Exits with 77 where this machine does not let itself be confined.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from pathlib import Path

CANNOT = 77
CALLS = {  # numbers of system calls
    "x86_64": {"io_uring": 425, "memfd": 319},
    "aarch64": {"io_uring": 425, "memfd": 279},
}
LIMITS = {
    "descriptors": resource.RLIMIT_NOFILE,
    "locked": resource.RLIMIT_MEMLOCK,
    "memory": resource.RLIMIT_AS,
}
# From <linux/seccomp.h>, <linux/filter.h> and <linux/prctl.h>.
SECCOMP_SET_MODE_FILTER, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 2, 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 38, 22, 24
CAP_IPC_LOCK = 14  # with it, memory is locked without a limit
LIBC = ctypes.CDLL(None, use_errno=True)


def command(*wanted: str) -> list[str]:
    """What to put before a command's line."""
    return [sys.executable, str(Path(__file__).resolve()), *wanted, "--"]


def refuse(call: int, number: int) -> None:
    """From now on, and in all processes that this one starts, the system call fails with this error."""
    steps = [
        (LOAD_WORD, 0, 0, 0),  # the call's number
        (JUMP_EQUAL, 0, 1, call),
        (RETURN, 0, 0, SECCOMP_RET_ERRNO | number),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or LIBC.prctl(
        PR_SET_SECCOMP, SECCOMP_SET_MODE_FILTER, described, 0, 0
    ):
        sys.exit(CANNOT)


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--")
    for word in words[:split]:
        name, _, value = word.partition("=")
        if name in LIMITS:
            try:
                resource.setrlimit(LIMITS[name], (int(value), int(value)))
            except (ValueError, OSError):
                sys.exit(CANNOT)
            if name == "locked" and LIBC.prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) and not os.getuid():
                sys.exit(CANNOT)
        else:
            known = CALLS.get(platform.machine())
            if known is None:
                sys.exit(CANNOT)
            refuse(known[name], getattr(errno, value))
    os.execvp(words[split + 1], words[split + 1 :])


if __name__ == "__main__":
    main()
