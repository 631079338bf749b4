"""Fuzz decoders for so many minutes each: `python -m workers.lab.fuzz --minutes 10 [NAME…]`."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import HypothesisException

from pipeline import program
from pipeline.console import say
from storage.errors import FlashringError, UsageError
from workers.lab.fuzz.targets import Target, targets

AT_ONCE = 2000  # examples between two looks at the clock


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Decoders; all without.", metavar="NAME")] = None,
    minutes: Annotated[float, typer.Option(help="Of each.", min=0.01)] = 10.0,
) -> None:
    """Give decoders changed and random input; anything but a sentence of ours is a failure."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        every = targets(Path(directory))
        known = [one.name for one in every]
        if unknown := set(names or ()) - set(known):
            raise UsageError(f"there is no decoder {min(unknown)}; known are {', '.join(known)}")
        for target in every:
            if not names or target.name in names:
                count, slowest, problem = run_for(target, minutes * 60)
                end = "; FAILED" if problem else ""
                say(f"{target.name}: {count:,} inputs, the slowest took {slowest:.2f} s{end}")
                if problem:
                    say(problem)
                    failed.append(target.name)
    if failed:
        raise FlashringError(f"these decoders failed: {', '.join(failed)}")


def run_for(target: Target, seconds: float, examples: int = AT_ONCE) -> tuple[int, float, str]:
    """Inputs, the longest time of one in seconds, and the first failure with its least input."""
    count, slowest, round_ = 0, 0.0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        round_ += 1

        @seed(round_)
        @settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(target.inputs)
        def attempt(value: Any) -> None:
            nonlocal count, slowest
            if time.monotonic() >= end:
                return
            begun = time.monotonic()
            try:
                target.check(value)
            finally:
                count, slowest = count + 1, max(slowest, time.monotonic() - begun)

        try:
            attempt()
        except HypothesisException:
            raise
        except Exception as error:
            return count, slowest, "".join(traceback.format_exception(error))
    return count, slowest, ""


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
