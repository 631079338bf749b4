"""What a timeline costs: `python -m workers.lab.bench.stamping --model STORE`.

Two rings of one store, of which one keeps stamps, decode the same tokens in turns. Told are the median times
of a token without and with a timeline, and the median of the ratios of neighbouring turns, which other work
on the machine disturbs least.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from pipeline import program
from pipeline.commands.options import Bits, ConfigFile, Memory, Model, Settings
from pipeline.config import Values
from pipeline.models.names import configure
from pipeline.planner.divide import plan as divide
from pipeline.ring import timeline
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from pipeline.status import waiting
from storage.errors import UsageError
from workers.lab.bench.job import TEXT

PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the turns; milliseconds a token."""

    turns: int
    off_ms: float
    on_ms: float
    ratio: float  # median of each turn's on / off
    ratio_quartiles: tuple[float, float]
    stamps_a_token: float

    @classmethod
    def of(cls, off: Sequence[float], on: Sequence[float], stamps_a_token: float) -> Cost:
        """`off` and `on`: seconds a token of each turn."""
        ratios = [with_it / without for without, with_it in zip(off, on, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (*ratios, 0.0, *ratios)
        return cls(
            len(off),
            1e3 * statistics.median(off),
            1e3 * statistics.median(on),
            statistics.median(ratios),
            (low, high),
            stamps_a_token,
        )


def token_seconds(session: Session, prompt: list[int], tokens: list[int]) -> float:
    """The median time from one forced token to the next."""
    for _ in session.pieces(prompt, GenerationParams(len(tokens), ignore_eos=True, forced=tuple(tokens))):
        pass
    assert session.last is not None
    return statistics.median(later - earlier for earlier, later in pairwise(session.last.moments))


def measure(off: Session, on: Session, ids: list[int], turns: int) -> tuple[list[float], list[float]]:
    """Seconds a token of each, in turns, each first in every other turn, after one that does not count."""
    prompt, tokens = ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:]
    found: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(turns + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            taken = token_seconds((off, on)[which], prompt, tokens)
            if turn:
                found[which].append(taken)
    return found[0], found[1]


def main(
    model: Model = "",
    memory: Memory = "",
    bits: Bits = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a turn.", min=2)] = 64,
    turns: Annotated[int, typer.Option(help="Turns of each ring.", min=1)] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Measure what --timeline costs a token: two rings in turns, one of which keeps stamps."""
    values: Values = {
        "model": {"bits": bits},
        "memory": {"budget": memory or None},
        "compute": {"context": PROMPT_TOKENS + tokens},
    }
    source, config = configure(model, config_file, settings or (), values)
    store = source.open_store()
    report = divide(store, config)
    with TemporaryDirectory(prefix="flashring-timeline-") as directory, waiting("measuring"):
        os.environ.pop(timeline.DIRECTORY, None)
        with Session(store, report.config, report.plan) as off:
            ids = off.encode(TEXT.read_text(encoding="utf-8"))[: PROMPT_TOKENS + tokens]
            if len(ids) < PROMPT_TOKENS + tokens:
                raise UsageError(f"the text has {len(ids)} tokens, fewer than {PROMPT_TOKENS + tokens}")
            os.environ[timeline.DIRECTORY] = directory
            with Session(store, report.config, report.plan) as on:
                del os.environ[timeline.DIRECTORY]
                times = measure(off, on, ids, turns)
        count = len(timeline.read(Path(directory)))
    cost = Cost.of(*times, count / ((turns + 1) * tokens))
    if as_json:
        print(json.dumps(asdict(cost)))
    else:
        print(
            f"{cost.turns} turns of {tokens} tokens: {cost.off_ms:.3f} ms a token without a timeline, "
            f"{cost.on_ms:.3f} with; {cost.ratio - 1:+.1%} by the median of turns "
            f"(half of them {cost.ratio_quartiles[0] - 1:+.1%} to {cost.ratio_quartiles[1] - 1:+.1%}), "
            f"{cost.stamps_a_token:.0f} stamps a token"
        )


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
