"""`evaluate`: passes its arguments on to `workers.evaluation`, which needs torch."""

from __future__ import annotations

import typer

from pipeline import launch


def command(context: typer.Context) -> int:
    """Compare the sparse model with the dense one on text and questions; see evaluate --help."""
    return launch.run_module("workers.evaluation", context.command_path, context.args)
