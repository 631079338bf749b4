"""The console script's entry, under a name that nobody else's package has.

`pipeline`, `storage` and `workers` are common names: installed beside, or on PYTHONPATH before,
another project's packages, ours may not be the ones that Python finds. That has to be noticed
before anything is imported from them.
"""

from __future__ import annotations

import importlib
import sys

PACKAGES = ("storage", "pipeline", "workers")


def shadowed() -> str | None:
    """One sentence naming a package that is not ours, or None."""
    for name in PACKAGES:
        try:
            package = importlib.import_module(name)
        except Exception as error:  # another project's package may fail in any way
            return f"the package {name!r} cannot be imported ({error!r}): install flashring again"
        if getattr(package, "PROJECT", None) != "flashring":
            where = getattr(package, "__file__", None) or next(iter(package.__path__))
            return (
                f"another project's package {name!r} at {where} stands in the place of flashring's: "
                "take it off PYTHONPATH, or install flashring into an environment of its own"
            )
    return None


def main() -> int:
    """Run the command line; returns the exit status."""
    sentence = shadowed()
    if sentence is not None:
        print(f"flashring: {sentence}", file=sys.stderr)
        return 2
    from pipeline.cli import main as command_line

    return command_line()
