"""`python -m workers.lab.evaluation.curve`: `run.py evaluate --oracle-curve` with more options."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import Bits, Model
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from storage.store import Store
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.curve.draw import Wanted, draw, wanted
from workers.lab.evaluation.curve.table import measured_table

SHARES = "0.5,0.3,0.2,0.1,0.05"
COPIES = "q8,q4"
TOKENS, CALIBRATION_TOKENS, LENGTH = 8192, 4096, 512
CENTRES = "rest"


def main(
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    calibration: Annotated[Path, typer.Option(help="Another one, for centres and thresholds.")],
    model: Model = "",
    bits: Bits = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=2)] = TOKENS,
    calibration_tokens: Annotated[
        int, typer.Option(help="Of the calibration text.", min=2)
    ] = CALIBRATION_TOKENS,
    length: Annotated[int, typer.Option(help="Tokens of a chunk.", min=2)] = LENGTH,
    shares: Annotated[str, typer.Option(help="Of the neurons, by commas.")] = SHARES,
    copies: Annotated[str, typer.Option(help="Low-bit formats, by commas.")] = COPIES,
    centres: Annotated[
        str, typer.Option(help="A neuron's usual activation: mean, median or rest.")
    ] = CENTRES,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What it costs to give only the best neurons of each token their true rows."""
    asked = wanted(text, calibration, tokens, calibration_tokens, length, shares, copies, centres)
    source, _ = configure(model, None, (), {"model": {"bits": bits}})
    tell(source.open_store(), asked, seed, threads, as_json)


def usual(text: Path, calibration: Path, tokens: int) -> Wanted:
    """What `run.py evaluate --oracle-curve` measures; `tokens` 0: as many as usual."""
    return wanted(text, calibration, tokens or TOKENS, CALIBRATION_TOKENS, LENGTH, SHARES, COPIES, CENTRES)


def tell(store: Store, asked: Wanted, seed: int, threads: int, as_json: bool) -> None:
    """Measure and print."""
    with Bars() as bars:
        found = draw(store, asked, seed, thread_count(threads), bars.tell)
    if as_json:
        print(json.dumps({"model": store.manifest.name, "rows": [asdict(one) for one in found]}))
    else:
        tables().print(measured_table(store.manifest.name, found))


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
