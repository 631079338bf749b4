"""`python -m workers.lab.evaluation.dials`: what the lossy dials of a mixture of experts cost, and save.

One text is read token by token with each dial (`pipeline/dials.py`), and without any beside it: by the ring's
own predictor, cache and layer loop, in one process and with a share of the experts in slots. What a ring
decides by what is resident is decided here by the same code, over the whole text.
"""

from __future__ import annotations

from workers import kernels  # isort: skip # noqa: F401  # before anything that may load OpenMP

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.table import Table

from pipeline import program
from pipeline.commands.options import Model, Settings
from pipeline.config import Config
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.dials import most_experts, with_fewer
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.status import waiting
from storage.errors import UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.compute.weights import Weights
from workers.lab.evaluation.evaluate import chunks
from workers.lab.evaluation.statistics import Estimate, proportion, ratio_of_perplexities
from workers.lab.evaluation.tasks import read_text
from workers.lab.offline.local_ring import LocalRing

_LENGTH = 256  # tokens of a chunk
EXACT = "exact"
PREFER, SKIP = (0.05, 0.1), (0.1, 0.2)  # of these dials, where no others are asked for


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one setting beside the exact one."""

    name: str
    perplexity: float
    ratio: Estimate  # of perplexities
    divergence_mean: float  # Kullback–Leibler, nats a token, from the exact one
    agreement: Estimate  # share of tokens whose likeliest next token is the same
    experts: float  # computed, a token
    misses: float  # experts read, a token; guesses are among them
    bytes_per_token: float


@dataclass(slots=True)
class _Scores:
    """One setting's ring, and what it has made of the text so far."""

    ring: LocalRing
    nats: list[float] = field(default_factory=list)  # of chunks
    divergence: float = 0.0
    agreeing: int = 0


def main(
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the text; 0: all.", min=0)] = 4000,
    share: Annotated[float, typer.Option(help="Of the experts in slots.", min=0, max=1)] = 0.5,
    point: Annotated[
        list[str] | None,
        typer.Option(help='Settings to compare: "NAME: section.key=value …"; may be repeated.'),
    ] = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity, divergence, agreement and bytes of the lossy dials beside the exact mixture."""
    base = [f"cache.share={share}", *(settings or ())]
    source, _ = configure(model, None, base)
    store = source.open_store()
    if not store.architecture.mixture:
        raise UsageError(f"the dials are a mixture's, and {store.manifest.name} has no experts")
    named = {EXACT: (), **(_named(point) if point else dict(_usual(store)))}
    configs = {name: configure(model, None, [*base, *some])[1] for name, some in named.items()}
    with waiting("measuring"):
        found, count = compare(store, configs, read_text(text), tokens, seed, thread_count(threads))
    if as_json:
        rows = [asdict(one) for one in found]
        print(json.dumps({"model": store.manifest.name, "tokens": count, "rows": rows}))
    else:
        tables().print(table(found, count))


def _named(points: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Raises UsageError for a point without a name."""
    found = {}
    for text in points:
        name, colon, settings = text.partition(": ")
        if not colon:
            raise UsageError(f'--point takes "NAME: section.key=value …", not {text!r}')
        found[name.strip()] = tuple(settings.split())
    return found


def _usual(store: Store) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each dial by itself, at two settings."""
    most = most_experts(store.architecture)
    for count in sorted({max(1, most - 1), max(1, most // 2)}, reverse=True):
        yield f"{count} of {most} experts", (f"experts.per_token={count}",)
    yield from ((f"prefer {value:g}", (f"experts.prefer={value}",)) for value in PREFER)
    yield from ((f"skip {value:g}", (f"experts.skip={value}",)) for value in SKIP)


def compare(
    store: Store, configs: dict[str, Config], text: str, tokens: int, seed: int, threads: int
) -> tuple[list[Cost], int]:
    """Every setting against the first, on the text's first `tokens`, 0: all; also the number of tokens."""
    sequences, _ = chunks(load_tokenizer(store), text, _LENGTH, tokens or None)
    units = [store.read_layer(index) for index in range(len(store.layout.layers))]
    with ExitStack() as opened:
        scores = {}
        for name, config in configs.items():
            report, chosen = plan(store, config), with_fewer(store, config)
            ring = LocalRing(chosen, report.config, report.plan, Weights(chosen), units, threads)
            scores[name] = _Scores(opened.enter_context(ring))
        for sequence in sequences:
            reference = None
            for one in scores.values():
                reference = _score(one, sequence, reference)
    counts = np.array([len(sequence) - 1 for sequence in sequences])
    base, *_ = scores.values()
    stride = store.layout.stride
    return [_summed(name, one, base, counts, stride, seed) for name, one in scores.items()], int(counts.sum())


def _score(
    one: _Scores, sequence: Sequence[int], reference: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """Read a chunk, its first token as a prompt; returns the exact log-probabilities [tokens, vocabulary]."""
    first, *others = sequence[:-1]
    logits = np.stack([one.ring.prefill([first])[-1], *map(one.ring.step, range(1, len(sequence)), others)])
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    reference = logs if reference is None else reference
    one.nats.append(-float(sum(row[after] for row, (_, after) in zip(logs, pairwise(sequence), strict=True))))
    one.divergence += float((np.exp(reference) * (reference - logs)).sum())
    one.agreeing += int(np.count_nonzero(logs.argmax(axis=1) == reference.argmax(axis=1)))
    return reference


def _summed(
    name: str, one: _Scores, base: _Scores, counts: npt.NDArray[np.int64], stride: int, seed: int
) -> Cost:
    nats, total = np.array(one.nats), int(counts.sum())
    decoded = total - counts.size  # a chunk's first token is a prompt
    return Cost(
        name=name,
        perplexity=float(np.exp(nats.sum() / total)),
        ratio=ratio_of_perplexities(nats, np.array(base.nats), counts, seed),
        divergence_mean=one.divergence / total,
        agreement=proportion(one.agreeing, total),
        experts=one.ring.computed / decoded,
        misses=one.ring.read / decoded,
        bytes_per_token=one.ring.read * stride / decoded,
    )


def table(found: Sequence[Cost], count: int) -> Table:
    shown = Table(
        f"{count:,} tokens",
        "perplexity",
        "change",
        "KL mean",
        "same next token",
        "experts a token",
        "read",
        "KB read",
    )
    for one in found:
        shown.add_row(
            one.name,
            f"{one.perplexity:.4f}",
            one.ratio.beyond(1).percent(),
            f"{one.divergence_mean:.5f}",
            f"{one.agreement.value:.2%}",
            f"{one.experts:.1f}",
            f"{one.misses:.2f}",
            f"{one.bytes_per_token / 1e3:,.0f}",
        )
    return shown


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
