"""Files: what is written lasts or was never there; what is read once does not stay in the page cache.

Nothing here knows what a file holds. A system's refusal stays an OSError: only the caller knows what
it means.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"  # behind the name of a file while it is written


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A new file to write, which becomes `path` when the block ends. After an exception nothing has changed.

    With `shared`, several processes may replace the same file at once: each writes under a name of
    its own, which nobody cleans up after a kill.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}" if shared else path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write durably and atomically: `path` is as it was, or holds all of `data`; see `replacing`."""
    with replacing(path, shared=shared) as file:
        file.write(data)


def publish(complete: Path, path: Path) -> None:
    """Give what is complete and synced, a file or a directory, its name: durably and at once."""
    os.replace(complete, path)
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


def read_once(descriptor: int, target: Any, offset: int) -> int:
    """Read into the buffer `target` at `offset`; returns the bytes read, 0 at the file's end.

    The page cache keeps nothing of it: what is read but once should not push out what is used again.
    """
    count = os.preadv(descriptor, [target], offset)
    if count:
        drop_cache(descriptor, offset, count)
    return count


def drop_cache(descriptor: int, start: int = 0, length: int = 0) -> None:
    """Let go of what the page cache holds of a file; length 0: to its end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def from_disk(path: Path) -> BinaryIO:
    """Open for reading; drop what the page cache holds, which may differ from the disk."""
    file = path.open("rb")
    drop_cache(file.fileno())
    return file


def blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The rest of a file, `size` bytes at a time."""
    while block := file.read(size):
        yield block
