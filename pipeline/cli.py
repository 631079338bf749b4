"""The command line: `run.py --prompt TEXT` is the main job, other jobs are subcommands.

One file per command stands in `commands/`; `commands/programs.py` lists those that are programs of their own.
`ending.py` turns failures into sentences.
"""

from __future__ import annotations

from pipeline import launch, program
from pipeline.commands import (
    chat,
    convert,
    doctor,
    generate,
    plan,
    programs,
    repair,
    serve,
    shadow,
    stores,
    timeline,
    tune,
    verify,
)
from pipeline.ending import exit_status

app = program.make(completion=True)
app.callback(invoke_without_command=True, help=generate.__doc__)(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.command("plan")(plan.command)
app.command("doctor")(doctor.command)
app.command("tune")(tune.command)
app.command("timeline")(timeline.command)
app.command("convert")(convert.command)
app.add_typer(stores.app, name="stores")
app.command("verify")(verify.command)
app.command("repair")(repair.command)
app.command("shadow")(shadow.command)
programs.add_to(app)


def main() -> int:
    """Run the command line; returns the exit status."""
    return exit_status(launch.check_packages) or program.run(app)
