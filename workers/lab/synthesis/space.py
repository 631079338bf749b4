"""Whether the disk has room for what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from storage.errors import DiskFull

SLACK_BYTES = 64 << 20  # free space asked for beyond the tensors' own


def check_space(total: int, out: Path, what: str) -> None:
    """Raises DiskFull when the disk has not room for `total` bytes of `out`."""
    place = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < total + SLACK_BYTES:
        raise DiskFull(
            f"{what} needs {total / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free: make room, choose "
            "another place, or fewer layers"
        )
