"""`train-predictor`: passes its arguments on to `workers.predictor.train`, which needs torch."""

from __future__ import annotations

import typer

from pipeline import launch


def command(context: typer.Context) -> int:
    """Train the predictors of a model on a text; see train-predictor --help."""
    return launch.run_module("workers.predictor.train", context.command_path, context.args)
