"""`python -m workers.lab.evaluation.curve`: the program behind `run.py evaluate --oracle-curve`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from pipeline import program
from pipeline.commands.options import Bits, Model
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from storage.errors import UsageError
from storage.store import Store
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.curve.calibration import Calibration, Centre, Mode, calibrate, centres_of
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.measure import Measured, measure
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.table import measured_table
from workers.lab.evaluation.curve.variant import Variant, plain
from workers.lab.training.texts import rows

USUAL_SHARES = "0.5,0.3,0.2,0.1,0.05"
USUAL_COPIES = "q8,q4"


def main(
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    calibration: Annotated[Path, typer.Option(help="Another one, for centres and thresholds.")],
    model: Model = "",
    bits: Bits = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=2)] = 8192,
    calibration_tokens: Annotated[int, typer.Option(help="Of the calibration text.", min=2)] = 2048,
    length: Annotated[int, typer.Option(help="Tokens of a chunk.", min=2)] = 512,
    shares: Annotated[str, typer.Option(help="Of the neurons, by commas.")] = USUAL_SHARES,
    copies: Annotated[str, typer.Option(help="Low-bit formats, by commas.")] = USUAL_COPIES,
    centres: Annotated[str, typer.Option(help="A neuron's usual activation: mean, median or rest.")] = "rest",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="0: as many as there are CPUs.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What it costs to give only the best neurons their true rows, skipped or with the others in low bits."""
    curve(
        model, bits, text, calibration, tokens, calibration_tokens, length, shares, copies, centres, seed,
        threads, as_json,
    )


def curve(
    model: str,
    bits: int | None,
    text: Path,
    calibration: Path,
    tokens: int,
    calibration_tokens: int,
    length: int,
    shares: str,
    copies: str,
    centres: str,
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """The command, with its options as they were given."""
    wanted = _shares(shares)
    names = [name.strip() for name in copies.split(",") if name.strip()]
    for name in names:
        Copy.of(name)
    kind = _centre(centres)
    source, _ = configure(model, None, (), {"model": {"bits": bits}})
    store = source.open_store()
    found = draw(
        store, rows(text, store, tokens, longest=length),
        rows(calibration, store, calibration_tokens, longest=length), wanted, names, kind, seed,
        thread_count(threads),
    )
    if as_json:
        print(json.dumps({"model": store.manifest.name, "rows": [asdict(one) for one in found]}))
    else:
        tables().print(measured_table(f"{found[0].variant.name} and others", found))


def _shares(text: str) -> list[float]:
    """Raises UsageError for what is no share."""
    try:
        found = [float(one) for one in text.split(",") if one.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < one < 1 for one in found):
        raise UsageError(f"--shares takes numbers between 0 and 1, by commas, not {text!r}")
    return found


def _centre(text: str) -> Centre:
    """Raises UsageError for another."""
    for kind in get_args(Centre):
        if kind == text:
            return kind
    raise UsageError(f"--centres is one of {', '.join(get_args(Centre))}, not {text!r}")


def draw(store, text, calibration_text, shares, copies, centres, seed, threads) -> list[Measured]:
    """Every variant of the curve on `text` [chunks, length], the exact model first."""
    with Bars() as bars:
        passes = Passes(store, copies, threads)
        centres = centres_of(passes, calibration_text, kind, lambda *at: bars.tell("centres", *at))
        modes = [Mode(copy, others) for copy in copies for others in ("low", "mean", "nothing")]
        known = calibrate(
            passes, calibration_text, shares, modes, centres, lambda *at: bars.tell("thresholds", *at)
        )
        variants = [*_oracles(shares), *_shadows(known, copies)]
        return measure(passes, text, variants, centres, seed, lambda *at: bars.tell("curve", *at))


def _oracles(shares: Sequence[float]) -> Iterator[Variant]:
    """The best neurons of each token, chosen by their true activations; the others skipped."""
    for share in shares:
        yield Variant(f"oracle {share:.0%}, skip", share=share)
        yield Variant(f"oracle {share:.0%}, mean", share=share, centred=True, others="mean")


def _shadows(known: Calibration, copies: Sequence[str]) -> Iterator[Variant]:
    """What a low-bit copy is enough for."""
    for copy in copies:
        yield plain(copy)
        for place, share in enumerate(known.shares):
            yield Variant(f"oracle {share:.0%}, {copy}", share=share, others="low", copy=copy)
            for others in ("low", "mean", "nothing"):
                mode = Mode(copy, others)
                thresholds = [float(one) for one in known.tables[mode].thresholds[:, place]]
                yield mode.variant(f"{copy} chooses {share:.0%}, {_WORDS[others].format(copy)}", thresholds)
            low = Mode(copy, "low", "down")
            thresholds = [float(one) for one in known.tables[Mode(copy)].thresholds[:, place]]
            yield low.variant(f"{copy} chooses {share:.0%}, {copy}, reads down", thresholds)
            for scored in ("early", "previous"):
                yield Variant(
                    f"{copy} chooses {share:.0%} {scored}, {copy}",
                    share=share, scored=scored, others="low", copy=copy,
                )


_WORDS = {"low": "{}", "mean": "mean", "nothing": "skip"}


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
