"""The two streams: the text goes to standard output, what is said to people to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

ERASE = "\x1b[K"  # a terminal: from the cursor to the end of its line
QUIET = "FLASHRING_QUIET"  # of the environment
FILE_WIDTH = 160  # columns of a table in a file or a pipe, where a terminal's 80 would cut words
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def be_quiet() -> None:
    """From now on nothing but text and errors is written, also by programs that this one starts."""
    os.environ[QUIET] = "1"


def is_quiet() -> bool:
    return bool(os.environ.get(QUIET))


def say(sentence: str) -> None:
    """One line on standard error, unless it is quiet. Where it cannot be written, work goes on without it."""
    if not is_quiet():
        always_say(sentence)


def always_say(sentence: str) -> None:
    """`say` for what went wrong, which is said also where it is quiet."""
    with contextlib.suppress(OSError):
        rest = ERASE if sys.stderr.isatty() else ""  # of a line that a Status shows
        print(rest + sentence, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text on standard output, at once. Raises an OSError that names the stream, such as for a full disk."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def write_json(data: Any) -> None:
    """One value on standard output, which is JSON whatever characters the stream can hold."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    write(json.dumps(data, ensure_ascii=not encoding.startswith("utf"), indent=2) + "\n")


def tables() -> Console:
    """Rich's console on standard output, wide enough for every table where that is no terminal."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=FILE_WIDTH)


def size(count: float) -> str:
    """Bytes for people: `1.50 GiB`."""
    for unit, scale in reversed(UNITS.items()):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{int(count)} B"
