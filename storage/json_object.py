"""A JSON object out of a checkpoint's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from storage.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        unreadable(path, error)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object")
    return data


def unreadable(path: Path, error: Exception) -> NoReturn:
    """Raises CheckpointError with the first line of what `error` says."""
    reason = str(error).strip().split("\n")[0]
    raise CheckpointError(f"{path} cannot be read: {reason}") from error
