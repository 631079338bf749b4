"""How long a command says nothing: `python -m workers.lab.bench.silence -- run.py convert MODEL STORE`.

The command runs twice, in a pipe and on a terminal of its own, and whatever it writes to either stream is a
sign of life. A long command should be silent for five seconds at most. A command that begins with `run.py` or
`-m MODULE` gets this interpreter.
"""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated

import typer

from pipeline import program
from pipeline.launch import ROOT
from storage.errors import UsageError

GOAL = 5.0  # seconds
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Heard:
    """What a command wrote, and when: seconds of `time.monotonic`."""

    started: float
    ended: float
    moments: tuple[float, ...]
    text: str
    status: int

    def longest(self, start: float | None = None, end: float | None = None) -> float:
        """The longest silence between two moments of the clock, by default in the command's whole life."""
        first = self.started if start is None else start
        last = self.ended if end is None else end
        return longest(self.moments, first, last)


def longest(moments: Iterable[float], start: float, end: float) -> float:
    """The longest time without any of the moments from `start` to `end`."""
    inside = [start, *(one for one in sorted(moments) if start < one < end), end]
    return max(later - earlier for earlier, later in pairwise(inside))


def listen(command: Sequence[str], *, terminal: bool, environment: Mapping[str, str] | None = None) -> Heard:
    """Run a command to its end, with both streams on a terminal or in a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    started = time.monotonic()
    moments: list[float] = []
    pieces: list[bytes] = []
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        while True:
            if not select.select([ours], [], [], LOOK_SECONDS)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # a terminal that nobody has open any more
                break
            if not piece:
                break
            moments.append(time.monotonic())
            pieces.append(piece)
        status = process.wait()
    finally:
        os.close(ours)
    text = b"".join(pieces).decode(errors="replace")
    return Heard(started, time.monotonic(), tuple(moments), text, status)


@dataclass(frozen=True, slots=True)
class Silence:
    """Of one run."""

    where: str
    seconds: float  # of the run
    longest_silence: float
    status: int


def main(
    command: Annotated[list[str], typer.Argument(help="What to run.", metavar="COMMAND…")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the longest silence of a command, in a pipe and on a terminal."""
    line = _line(command)
    found = []
    for where in ("pipe", "terminal"):
        heard = listen(line, terminal=where == "terminal")
        found.append(Silence(where, heard.ended - heard.started, heard.longest(), heard.status))
        if heard.status:
            raise UsageError(f"the command failed with status {heard.status}: {heard.text.strip()[-500:]}")
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    for one in found:
        verdict = "" if one.longest_silence <= GOAL else f", more than {GOAL:g} s"
        print(f"{one.where:<10}{one.seconds:>8.1f} s, longest silence {one.longest_silence:.1f} s{verdict}")


def _line(command: Sequence[str]) -> list[str]:
    if command[0] == "run.py":
        return [sys.executable, str(ROOT / "run.py"), *command[1:]]
    return [sys.executable, *command] if command[0] == "-m" else list(command)


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
