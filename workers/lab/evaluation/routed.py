"""`python -m workers.lab.evaluation.routed`: a mixture's perplexity with few experts in memory, and with all.

Two rings decode the same tokens of a text, one by one. One has the slots of the configuration and reads what
the routers choose; the other holds every expert. Both tell every token's log-probability, which must be the
same number, since a router is no approximation.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import program
from pipeline.commands.options import ConfigFile, Model, Settings
from pipeline.config import Config
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.errors import UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.tasks import read_text

Progress = Callable[[str, int, int], None]

EVERY: dict[str, dict[str, Any]] = {
    "predictor": {"kind": "all"},
    "cache": {"share": 1.0, "slots_per_layer": 0},
    "memory": {"budget": ""},
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the same tokens by both rings."""

    tokens: int  # that are scored
    slots: float  # of the ring that reads, as a share of all experts
    read_bytes: float  # a token, by that ring
    perplexity: float  # of that ring
    perplexity_all: float  # of the ring that holds every expert
    different: int  # tokens whose log-probabilities are not the same number
    largest: float  # difference of a log-probability


def main(
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the text.", min=2)] = 1000,
    config_file: ConfigFile = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a mixture that reads the experts its routers choose with one that holds them all."""
    source, config = configure(model, config_file, settings or ())
    store = source.open_store()
    ids = load_tokenizer(store).encode(read_text(text)).ids[: tokens + 1]
    with Bars() as bars:
        found = compare(store, config, ids, bars.tell)
    if as_json:
        print(json.dumps({"model": store.manifest.name, **asdict(found)}))
        return
    print(
        f"{found.tokens:,} tokens; slots for {found.slots:.1%} of the experts, {found.read_bytes:,.0f} bytes "
        "read a token"
    )
    print(f"perplexity {found.perplexity!r}, with every expert in memory {found.perplexity_all!r}")
    print(f"{found.different} log-probabilities differ, at most by {found.largest:g}")


def compare(
    store: Store,
    config: Config,
    ids: Sequence[int],
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Both rings on `ids`, of which the first is the prompt.

    Raises UsageError for a model without routers, for a text of one token and for one that is too long.
    """
    if not store.architecture.mixture:
        raise UsageError(f"{store.manifest.name} is no mixture of experts")
    if not 2 <= len(ids) <= store.architecture.max_positions:
        raise UsageError(
            f"{len(ids)} tokens with the first one: {store.manifest.name} takes 2 to "
            f"{store.architecture.max_positions}"
        )
    config = config.replace(compute={"context": len(ids)})
    few = _decode(store, config, ids, progress, "with the routers' experts")
    every = _decode(store, config.replace(**EVERY), ids, progress, "with all experts")
    apart = [abs(one - other) for one, other in zip(few.logprobs, every.logprobs, strict=True)]
    return Comparison(
        tokens=len(few.logprobs),
        slots=few.slots,
        read_bytes=few.read_bytes,
        perplexity=_perplexity(few.logprobs),
        perplexity_all=_perplexity(every.logprobs),
        different=sum(difference > 0 for difference in apart),
        largest=max(apart),
    )


@dataclass(frozen=True, slots=True)
class _Decoded:
    """What one ring told."""

    logprobs: list[float]
    slots: float  # share of the experts
    read_bytes: float  # a token


def _decode(store: Store, config: Config, ids: Sequence[int], progress: Progress, stage: str) -> _Decoded:
    report = plan(store, config)
    forced = GenerationParams(len(ids) - 1, ignore_eos=True, forced=tuple(ids[1:]))
    with Session(store, report.config, report.plan, budget=report.budget) as session:
        for done, _ in enumerate(session.pieces(ids[:1], forced), 1):
            progress(stage, min(done, len(ids) - 1), len(ids) - 1)
        assert session.last is not None
        logprobs, summary = session.last.logprobs, session.summary()
    return _Decoded(logprobs, report.plan.total_slots / sum(report.plan.units), summary.flash.bytes_per_token)


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
