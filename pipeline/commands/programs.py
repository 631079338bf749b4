"""The commands that are programs of their own, in `workers/lab/`: their arguments are passed on."""

from __future__ import annotations

from collections.abc import Callable

import typer

from pipeline import launch

# Each command's module, and what the list of commands says of it.
PROGRAMS = {
    "bench": (
        "workers.lab.bench",
        "Measure what a token costs, technique by technique, and how close that is to the hardware's limits",
    ),
    "bench-serving": ("workers.lab.bench.serving", "Measure what serving costs a token"),
    "bench-structured": (
        "workers.lab.structured",
        "Answer by JSON schemas, check every answer, and measure what a mask costs a token",
    ),
    "train-predictor": ("workers.lab.training", "Train the predictors of a model on a text"),
    "evaluate": (
        "workers.lab.evaluation",
        "Compare the sparse model with the dense one on text and questions",
    ),
    "calibrate": (
        "workers.lab.evaluation.curve.calibrate",
        "Measure the dial of a model without zeros, and keep it in its store",
    ),
    "relufy": (
        "workers.lab.relufy",
        "Swap a checkpoint's smooth activation for ReLU, and distil it against itself",
    ),
    "trace": ("workers.lab.traces", "Record which neurons a text uses, and replay it against cache policies"),
    "synthesize": ("workers.lab.synthesis", "Write or measure a synthetic checkpoint"),
}


def add_to(app: typer.Typer) -> None:
    """Make every program a command of `app`."""
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    for name, (module, summary) in PROGRAMS.items():
        app.command(name, help=f"{summary}.", context_settings=passed_on)(_starter(module))


def _starter(module: str) -> Callable[[typer.Context], int]:
    def command(context: typer.Context) -> int:
        return launch.run_module(module, context.command_path, context.args)

    return command
