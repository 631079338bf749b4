"""What is said to the person at the terminal: everything but the text goes to standard error."""

from __future__ import annotations

import sys

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def say(sentence: str) -> None:
    """One line on standard error."""
    print(sentence, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes for people: `1.50 GiB`."""
    for unit, scale in reversed(UNITS.items()):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{int(count)} B"
