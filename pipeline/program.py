"""What our programs have in common: one style of help, which calls them what the user called them.

Some commands of the command line are programs of their own (`workers.lab.evaluation` and others), because
they need torch: `launch.run_module` tells them under which name they were started.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

from pipeline.ending import exit_status
from pipeline.help import Group, Program
from pipeline.launch import PROGRAM, tell_started


def make(*, completion: bool = False) -> typer.Typer:
    """A program without commands yet. `completion`: with the options that make a shell complete it."""
    return Program(
        cls=Group,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def single(main: Callable[..., None]) -> int:
    """Run a program of one command; returns the exit status."""
    app = make()
    app.command()(main)
    return run(app)


def run(app: typer.Typer) -> int:
    """Run it on the process's arguments; returns the exit status."""
    tell_started()
    name = os.environ.pop(PROGRAM, None)  # None: as the interpreter was told, run.py or python -m MODULE
    return exit_status(lambda: app(standalone_mode=False, prog_name=name))
