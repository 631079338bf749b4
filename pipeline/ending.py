"""How a program ends: every expected failure is one sentence on standard error and an exit status.

0 done, 2 wrong use, 1 anything else; what nobody expected keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

import typer

from pipeline.console import always_say, write
from pipeline.ring import limits
from storage.errors import FlashringError, reason

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE

# The base of what the command line's parser raises; typer exports only some of its subclasses.
COMMAND_LINE_ERROR: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def exit_status(work: Callable[[], object]) -> int:
    """Do `work`; returns its own status where it returns one, and what its failure deserves else.

    SIGTERM, and SIGHUP where it is not ignored, end it like Ctrl-C: everything that was opened is closed on
    the way out.
    """
    _usable_streams()
    before = {number: signal.signal(number, _terminate) for number in asked_to_end()}
    try:
        result = work()
        write("")  # what is still in the buffer
        if result == INTERRUPTED:  # typer turns Ctrl-C into a result of its own
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except FlashringError as error:
        return _refuse(str(error), error.exit_code)
    except COMMAND_LINE_ERROR as error:
        return _refuse(_usage(error), WRONG_USE)
    except (KeyboardInterrupt, typer.Abort):
        return _refuse("interrupted", INTERRUPTED)
    except (BrokenPipeError, SystemExit) as end:  # typer and rich make the second of the first
        if BrokenPipeError not in (type(end), type(end.__context__)):
            raise
        # The reader of our output has left: nobody is there to tell, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, MemoryError, RuntimeError) as error:
        sentence = _describe(error)
        if not sentence:
            raise
        return _refuse(sentence, FAILED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_end() -> tuple[signal.Signals, ...]:
    """The signals, beside Ctrl-C, by which somebody wants the program gone; nohup ignores the second."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)


def _usable_streams() -> None:
    """Closed standard streams become /dev/null; what their encoding cannot hold becomes escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _refuse(sentence: str, status: int) -> int:
    always_say(f"flashring: {' '.join(sentence.split())}")
    return status


def _usage(error: Exception) -> str:
    format_message = getattr(error, "format_message", None)
    sentence = str(format_message() if callable(format_message) else error).rstrip(".")
    context = getattr(error, "ctx", None)
    command = f"{context.command_path} --help" if context else "--help"
    told = f"{sentence[:1].lower()}{sentence[1:]}; see {command}"
    takes_text = context is not None and any(one.name == "prompt" for one in context.command.params)
    return f"{told}; a text goes behind --prompt" if takes_text and "No such command" in sentence else told


def _describe(error: OSError | MemoryError | RuntimeError) -> str:
    """Empty: it is about nothing that a machine refuses."""
    if not isinstance(error, OSError):
        return limits.met(error)
    what = reason(error)
    return f"{error.filename}: {what}" if error.filename else what
