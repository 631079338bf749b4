"""`bench-serving`: what serving costs a token over run.py's own generation."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import Memory, Model, Settings
from pipeline.status import waiting
from storage.errors import FlashringError


def main(
    model: Model = "",
    memory: Memory = "",
    settings: Settings = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one timed answer.", min=2)] = 200,
    rounds: Annotated[int, typer.Option(help="Timed answers of each kind.", min=1)] = 5,
    clients: Annotated[int, typer.Option(help="Concurrent clients of the comparison of texts.", min=1)] = 8,
    requests: Annotated[int, typer.Option(help="Requests of each of them.", min=1)] = 20,
) -> None:
    """Measure what serving costs a token over run.py's own generation; prints one JSON object."""
    from workers.lab.bench.serving.measure import measure

    with waiting("measuring"):
        result = measure(
            model, memory, settings or (), tokens=tokens, rounds=rounds, clients=clients, requests=requests
        )
    print(json.dumps(result, indent=2))
    if not result["concurrent"]["equal"]:
        raise FlashringError("concurrent clients got other texts than lone runs")


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
