"""What a memory budget says: `7GiB`, `50%` of the checkpoint, or a sum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from storage.errors import ConfigError
from storage.manifest import RESIDENT
from storage.store import Store

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B|B|)", re.IGNORECASE)
_BARE = re.compile(r"\d+(?:\.\d+)?\s*[KMGT]", re.IGNORECASE)  # as other programs have it
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_budget(text: str, store: Store, key: str = "memory.budget") -> int | None:
    """Bytes of `7GiB`, `50%` (of the checkpoint) or a sum such as `50%+1GiB`; None for ''. `key` says it."""
    return parse_size(text, key, lambda: checkpoint_bytes(store)) if text.strip() else None


def parse_size(text: str, key: str, whole: Callable[[], int]) -> int:
    """Bytes of a size; a percentage is of `whole`. Raises ConfigError, which names `key`."""
    total = 0.0
    for term in text.split("+"):
        match = _SIZE.fullmatch(term.strip())
        if match is None:
            hint = f": say {term.strip()}iB" if _BARE.fullmatch(term.strip()) else ""
            raise ConfigError(f"{key} takes a size such as 7GiB or 50%, not {text!r}{hint}")
        number, unit = float(match[1]), match[2].upper()
        total += number / 100 * whole() if unit == "%" else number * _UNITS[unit]
    if not math.isfinite(total):
        raise ConfigError(f"{key} cannot be as large as {text[:20]}…")
    return int(total)


def checkpoint_bytes(store: Store) -> int:
    """The model's weights without padding: resident tensors and FFN matrices."""
    return store.manifest.files[RESIDENT].bytes + store.layout.useful_bytes
