"""Small files out of a checkpoint's directory: a JSON object, or bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from storage.errors import CheckpointError

_TERMINAL_CODE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|.)")
LFS_POINTER = b"version https://git-lfs"


def refuse_pointer(path: Path, begin: bytes) -> None:
    """Raises CheckpointError where a file's `begin` is that of a Git LFS pointer."""
    if begin.startswith(LFS_POINTER):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")


def read_whole(path: Path) -> bytes:
    """A small file's bytes. Raises CheckpointError naming the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except OSError as error:
        unreadable(path, error)
    refuse_pointer(path, data)
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError naming the file."""
    try:
        data = json.loads(read_whole(path).decode())
    except (ValueError, RecursionError) as error:
        unreadable(path, error)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object")
    return data


def unreadable(path: Path, error: Exception) -> NoReturn:
    """Raises CheckpointError with the first line of what `error` says, without codes for a terminal."""
    reason = _TERMINAL_CODE.sub("", str(error)).strip().split("\n")[0]
    raise CheckpointError(f"{path} cannot be read: {reason}") from error
