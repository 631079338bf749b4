"""Opening `bundles.bin`: past the page cache where the device can do that at the store's stride."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StoreError

STATX_DIOALIGN = 0x2000  # Linux 6.1
AT_EMPTY_PATH = 0x1000
STATX_BYTES = 256
DIO_MEM_ALIGN_AT = 152  # offset of stx_dio_mem_align in struct statx; stx_dio_offset_align follows


@dataclass(frozen=True, slots=True)
class BundleFile:
    """An open file of bundles. Use as a context manager."""

    path: Path
    descriptor: int
    size: int  # bytes
    flags: int  # it was opened with
    note: str  # how it is read, and why

    @classmethod
    def open(cls, path: Path, stride: int, direct: bool = True) -> BundleFile:
        """Open for reads whose offsets, lengths and addresses are multiples of `stride` bytes.

        Raises StoreError when the file cannot be opened.
        """
        if not direct:
            return cls._cached(path, "through the page cache, as configured")
        if not hasattr(os, "O_DIRECT"):
            return cls._uncached(path)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _unreadable(path, error) from error
            return cls._cached(path, "through the page cache, because the file system has no direct I/O")
        size = os.fstat(descriptor).st_size
        obstacle = _obstacle(descriptor, size, stride)
        if obstacle:
            os.close(descriptor)
            return cls._cached(path, f"through the page cache, because {obstacle}")
        return cls(path, descriptor, size, flags, "direct I/O")

    @classmethod
    def _cached(cls, path: Path, note: str) -> BundleFile:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            raise _unreadable(path, error) from error
        if hasattr(os, "posix_fadvise"):
            # Single bundles all over the file: read-ahead would fetch what nobody asked for.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return cls(path, descriptor, os.fstat(descriptor).st_size, flags, note)

    @classmethod
    def _uncached(cls, path: Path) -> BundleFile:
        """macOS: no O_DIRECT, but a switch that keeps reads out of the cache."""
        import fcntl

        file = cls._cached(path, "through the page cache, because this system has no direct I/O")
        switch = getattr(fcntl, "F_NOCACHE", None)
        if switch is None:
            return file
        fcntl.fcntl(file.descriptor, switch, 1)
        return cls(path, file.descriptor, file.size, file.flags, "uncached reads (F_NOCACHE)")

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> BundleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be opened: {error.strerror}")


def _obstacle(descriptor: int, size: int, stride: int) -> str:
    """Why direct reads at multiples of `stride` do not work; empty if they do."""
    alignment = direct_alignment(descriptor)
    if alignment is None:
        return "" if _probe(descriptor, size, stride) else f"direct reads of {stride} bytes fail here"
    if alignment == 0:
        return "the file system has no direct I/O for this file"
    if stride % alignment:
        return (
            f"direct I/O needs multiples of {alignment} bytes here and the store's stride is {stride}; "
            f"convert with a larger alignment"
        )
    return ""


def direct_alignment(descriptor: int) -> int | None:
    """Bytes that offsets, lengths and addresses of direct reads must be multiples of.

    0: no direct I/O on this file; None: the system does not say.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    answer = ctypes.create_string_buffer(STATX_BYTES)
    try:
        status = libc.statx(descriptor, b"", AT_EMPTY_PATH, STATX_DIOALIGN, answer)
    except AttributeError:  # a C library without statx
        return None
    (mask,) = struct.unpack_from("<I", answer)
    if status != 0 or not mask & STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("<II", answer, DIO_MEM_ALIGN_AT)
    return int(max(memory, offset))


def _probe(descriptor: int, size: int, stride: int) -> bool:
    """Try one direct read, at the least aligned place that a bundle can have."""
    with mmap.mmap(-1, 2 * stride) as buffer, memoryview(buffer) as view, view[stride:] as target:
        offset = stride if size >= 2 * stride else 0
        with contextlib.suppress(OSError):
            return os.preadv(descriptor, [target], offset) >= 0
    return False
