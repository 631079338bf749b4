"""Files: what is written lasts or was never there; what is read once does not stay in the page cache."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".tmp"  # behind the name of a file while it is written


def write_whole(path: Path, data: bytes) -> None:
    """Write durably and atomically: `path` is as it was, or holds all of `data`. Raises OSError."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make a rename or a new name in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_direct(path: Path) -> int:
    """A descriptor for reads past the page cache, or through it on a file system that knows no other."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except FileNotFoundError:
        raise
    except OSError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def drop_cache(descriptor: int, start: int = 0, length: int = 0) -> None:
    """Let go of what the page cache holds of a file; length 0: to its end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
