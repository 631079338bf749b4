"""`timeline`: what bounds a run, in words, from the file that `--timeline FILE` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import write, write_json
from pipeline.tracing import bound, reading, trace


def command(
    file: Annotated[Path, typer.Argument(help="What --timeline has written.", metavar="FILE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what bounded a run, from the file of --timeline.

    A table says where a token's time went.
    """
    found = reading.read(trace.load(file))
    sentences = bound.describe(found)
    if as_json:
        write_json({**found.to_json(), "sentences": sentences})
    else:
        write("\n".join([*sentences, "", bound.table(found)]) + "\n")
