"""The command line: `run.py --prompt TEXT` is the main job, other jobs are subcommands.

One file per command stands in `commands/`; this one joins them and turns every expected failure
into one sentence on standard error and an exit status: 0 done, 2 wrong use, 1 anything else.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer

from pipeline import launch
from pipeline.commands import convert, generate, train_predictor, verify
from storage.errors import FlashringError

WRONG_USE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE

# The base of what the parser raises; typer exports only some of its subclasses.
COMMAND_LINE_ERROR: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=False,
    help=generate.__doc__,
)
app.callback(invoke_without_command=True)(generate.command)
app.command("convert")(convert.command)
app.command("verify")(verify.command)
app.command("train-predictor", context_settings=PASS_THROUGH, add_help_option=False)(train_predictor.command)


def main() -> int:
    """Run the command line; returns the exit status."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run()
    finally:
        signal.signal(signal.SIGTERM, before)


def _run() -> int:
    try:
        launch.check_packages()
        result = app(standalone_mode=False, prog_name=_program())
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except FlashringError as error:
        return _refuse(str(error), error.exit_code)
    except COMMAND_LINE_ERROR as error:
        return _refuse(_usage(error), WRONG_USE)
    except (KeyboardInterrupt, typer.Abort):
        return _refuse("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left: nobody is there to tell, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _refuse(_describe(error), 1)


def _program() -> str:
    return "flashring" if os.path.basename(sys.argv[0]) == "flashring" else "run.py"


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: everything that was opened is closed on the way out."""
    raise KeyboardInterrupt


def _refuse(sentence: str, status: int) -> int:
    print(f"flashring: {' '.join(sentence.split())}", file=sys.stderr)
    return status


def _usage(error: Exception) -> str:
    format_message = getattr(error, "format_message", None)
    sentence = str(format_message() if callable(format_message) else error).rstrip(".")
    return f"{sentence[:1].lower()}{sentence[1:]}; see {_program()} --help"


def _describe(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what
