"""`trace`: passes its arguments on to `workers.traces`, which needs torch."""

from __future__ import annotations

import typer

from pipeline import launch


def command(context: typer.Context) -> int:
    """Record which neurons a text uses, and replay it against cache policies; see trace --help."""
    return launch.run_module("workers.traces", context.command_path, context.args)
