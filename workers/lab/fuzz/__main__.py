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
    minutes: Annotated[float, typer.Option(help="Of processor time, for each.", min=0.01)] = 10.0,
    first_seed: Annotated[
        int, typer.Option("--seed", help="Of the first round; each later one has the next.")
    ] = 1,
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
                count, slowest, last, problem = run_for(target, minutes * 60, first=first_seed)
                end = "; FAILED" if problem else ""
                seeds = f"seeds {first_seed} to {last}"
                say(f"{target.name}: {count:,} inputs, {seeds}, the slowest took {slowest:.2f} s{end}")
                if problem:
                    say(problem)
                    failed.append(target.name)
    if failed:
        raise FlashringError(f"these decoders failed: {', '.join(failed)}")


def run_for(
    target: Target, seconds: float, examples: int = AT_ONCE, first: int = 1
) -> tuple[int, float, int, str]:
    """Inputs, seconds of the longest, the last round's seed, and the first failure with its least input.

    Seconds are the processor's: a process that others stop for minutes has tried nothing meanwhile.
    """
    count, slowest, round_ = 0, 0.0, first - 1
    end = time.process_time() + seconds
    while time.process_time() < end:
        round_ += 1

        @seed(round_)
        @settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(target.inputs)
        def attempt(value: Any) -> None:
            nonlocal count, slowest
            if time.process_time() >= end:
                return
            begun = time.process_time()
            try:
                target.check(value)
            finally:
                count, slowest = count + 1, max(slowest, time.process_time() - begun)

        try:
            attempt()
        except HypothesisException:
            raise
        except Exception as error:
            return count, slowest, round_, "".join(traceback.format_exception(error))
    return count, slowest, round_, ""


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
