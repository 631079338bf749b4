"""Runs a command with one of its steps slowed down: `slowed.py FILE MODULE FUNCTION PROGRAM ARGUMENT…`.

The named function of the named module sleeps at its first call. FILE gets the moments between which it slept.
PROGRAM is `run.py`, or the module of one of its programs.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 6.5


def slow_down(module: str, name: str, note: Path) -> None:
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    true = getattr(owner, last)

    def slow(*arguments: Any, **named: Any) -> Any:
        if not note.exists():
            started = time.monotonic()
            note.write_text("[]")
            time.sleep(SECONDS)
            note.write_text(json.dumps([started, time.monotonic()]))
        return true(*arguments, **named)

    setattr(owner, last, slow)


if __name__ == "__main__":
    note, module, name, program, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.argv = [program, *arguments]
    slow_down(module, name, Path(note))
    if program == "run.py":
        from pipeline.cli import main

        sys.exit(main())
    found: Any = importlib.import_module(program)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{program}.__main__")
    sys.exit(found.run())
