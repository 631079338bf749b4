"""The command line: `run.py --prompt TEXT` is the main job, other jobs are subcommands.

One file per command stands in `commands/`; `ending.py` turns failures into sentences.
"""

from __future__ import annotations

import os
import sys

import typer

from pipeline import launch
from pipeline.commands import (
    bench,
    bench_serving,
    convert,
    evaluate,
    generate,
    serve,
    synthesize,
    trace,
    train_predictor,
    verify,
)
from pipeline.ending import exit_status, program

# For commands that hand all their arguments to a program in `workers`, `--help` included.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=generate.__doc__,
)
app.callback(invoke_without_command=True)(generate.command)
app.command("convert")(convert.command)
app.command("verify")(verify.command)
app.command("serve")(serve.command)
app.command("bench")(bench.command)
app.command("bench-serving")(bench_serving.command)
app.command("train-predictor", context_settings=PASS_THROUGH)(train_predictor.command)
app.command("evaluate", context_settings=PASS_THROUGH)(evaluate.command)
app.command("trace", context_settings=PASS_THROUGH)(trace.command)
app.command("synthesize", context_settings=PASS_THROUGH)(synthesize.command)


def main() -> int:
    """Run the command line; returns the exit status."""
    _usable_streams()
    return exit_status(_run)


def _usable_streams() -> None:
    """Closed standard streams become /dev/null; what their encoding cannot hold becomes escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run() -> object:
    launch.check_packages()
    return app(standalone_mode=False, prog_name=program())
