"""The command line: `run.py --prompt TEXT` is the main job, other jobs are subcommands.

One file per command stands in `commands/`; `ending.py` turns failures into sentences.
"""

from __future__ import annotations

from pipeline import launch, program
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
from pipeline.ending import exit_status

# For commands that hand all their arguments to a program in `workers`, `--help` included.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = program.make()
app.callback(invoke_without_command=True, help=generate.__doc__)(generate.command)
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
    return exit_status(launch.check_packages) or program.run(app)
