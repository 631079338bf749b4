"""A memory cgroup of one's own: the kernel's word on how much memory a command may use, and used.

Works with cgroup v1 and v2 where the memory controller can be had (usually as root). The page
cache that a process fills counts as well, which is why direct I/O matters under a limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of the control files in one version of the interface."""

    limit: str
    peak: str
    swap_limit: str


_V1 = _Files("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes")
_V2 = _Files("memory.max", "memory.peak", "memory.swap.max")


class CgroupUnavailable(Exception):
    """No memory controller that this process may use; the text says why."""


class MemoryCgroup:
    """A child cgroup with a memory limit in bytes. Use as a context manager."""

    def __init__(self, limit: int) -> None:
        """Raises CgroupUnavailable."""
        base, self._files = _controller()
        self.path = base / f"flashring-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.path.mkdir()
            self._write(self._files.limit, limit)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise CgroupUnavailable(f"no memory cgroup can be made under {base}: {error.strerror}") from error
        # Without this the limit could be met by swapping, which is not what it is for.
        with contextlib.suppress(OSError):
            self._write(self._files.swap_limit, 0 if self._files is _V2 else limit)

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def command(self, arguments: list[str]) -> list[str]:
        """`arguments`, started inside the group: children inherit it, so everything counts."""
        script = f'echo $$ > "{self.path / "cgroup.procs"}" && exec "$@"'
        return ["sh", "-c", script, "sh", *arguments]

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group ever used at once, page cache and kernel memory included.

        None where the kernel does not tell: Linux before 5.19 under cgroup v2.
        """
        try:
            return int((self.path / self._files.peak).read_text())
        except FileNotFoundError:
            return None

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the group; what still runs in it is killed."""
        for _attempt in range(250):  # the kernel lets go of exited processes a moment after their death
            with contextlib.suppress(OSError):
                if self.path.exists():
                    self.path.rmdir()
                return
            for pid in _read(self.path / "cgroup.procs"):
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)


def _controller() -> tuple[Path, _Files]:
    """The cgroup directory under which a child can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return ROOT / "memory", _V1
        if not controllers and "memory" in _read(ROOT / path.lstrip("/") / "cgroup.subtree_control"):
            return ROOT / path.lstrip("/"), _V2
        if not controllers and "memory" in _read(ROOT / "cgroup.subtree_control"):
            return ROOT, _V2
    raise CgroupUnavailable("this system has no memory controller that a child cgroup could use")


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
