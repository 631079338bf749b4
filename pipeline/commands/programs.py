"""The commands that are programs of their own, in `workers/lab/`: their arguments are passed on."""

from __future__ import annotations

from collections.abc import Callable

import typer

from pipeline import launch

# Each command's module, and what the list of commands says of it.
PROGRAMS = {
    "bench": (
        "workers.lab.bench",
        "Measure what a token costs, technique by technique",
    ),
    "bench-serving": ("workers.lab.bench.serving", "Measure what serving costs a token"),
    "bench-structured": (
        "workers.lab.structured",
        "Measure what answers by JSON schemas cost a token",
    ),
    "train-predictor": ("workers.lab.training", "Train the predictors of a ReLU model on a text"),
    "evaluate": (
        "workers.lab.evaluation",
        "Compare the sparse model with the dense one",
    ),
    "calibrate": (
        "workers.lab.evaluation.curve.calibrate",
        "Measure the dial of a model without zeros",
    ),
    "relufy": (
        "workers.lab.relufy",
        "Give a checkpoint ReLU, and distil it against itself",
    ),
    "trace": ("workers.lab.traces", "Record which neurons a text uses, and replay it"),
    "synthesize": ("workers.lab.synthesis", "Write a synthetic model of a published shape"),
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
