"""One writer at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import UsageError


@contextmanager
def locked(directory: Path, work: str) -> Iterator[None]:
    """Hold a lock on `directory`, gone with the process. Raises UsageError where another such `work` does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another {work} is writing {directory}") from None
        yield
    finally:
        os.close(descriptor)
