"""`synthesize`: passes its arguments on to `workers.synthesis`, which needs torch."""

from __future__ import annotations

import typer

from pipeline import launch


def command(context: typer.Context) -> int:
    """Write or measure a synthetic checkpoint; see synthesize --help."""
    return launch.run_module("workers.synthesis", context.command_path, context.args)
