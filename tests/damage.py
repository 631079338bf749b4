"""Damage for tests: bits flipped in a store's files."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, offset: int, bit: int = 4) -> None:
    """Turn one bit of a file over; a negative offset counts from its end."""
    with path.open("r+b") as file:
        file.seek(offset, 0 if offset >= 0 else 2)
        at = file.tell()
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
