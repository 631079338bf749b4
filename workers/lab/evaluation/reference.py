"""`python -m workers.lab.evaluation.reference`: our reading of a model beside transformers', on one text.

Both score the same chunks of the same tokens, every neuron computed, in float32. What differs is who reads
the file: a store that was converted from it, or transformers itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table

from pipeline import program
from pipeline.commands.options import Model
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.status import waiting
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.bars import Bars
from workers.lab.evaluation.evaluate import LONGEST_CHUNK, chunks
from workers.lab.evaluation.report import compare_text
from workers.lab.evaluation.statistics import Estimate
from workers.lab.evaluation.tasks import read_text
from workers.lab.evaluation.transformers_model import TransformersModel
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.scoring import score


@dataclass(frozen=True, slots=True)
class Compared:
    """Two readings of one text."""

    tokens: int
    their_nats_per_token: float
    our_nats_per_token: float
    their_perplexity: float
    our_perplexity: float
    ratio: Estimate  # our ÷ their perplexity
    agreement: Estimate  # share of tokens whose likeliest next token is the same
    furthest: float  # largest difference of a token's log-probability, nats


def main(
    checkpoint: Annotated[
        Path, typer.Option(help="What transformers reads: a GGUF file, or a checkpoint's directory.")
    ],
    text: Annotated[Path, typer.Option(help="A text whose perplexity is wanted; may be .xz.")],
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the text; 0: all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of a text: by transformers' reading of a checkpoint, and by a store converted from it."""
    source, _ = configure(model, None, ())
    store = source.open_store()
    with waiting("opening the checkpoint"):
        theirs = TransformersModel.open(checkpoint)
    found = compare(store, theirs, read_text(text), tokens, seed, thread_count(threads))
    if as_json:
        print(json.dumps({"model": store.manifest.name, **asdict(found)}))
    else:
        tables().print(table(found))


def compare(
    store: Store, theirs: TransformersModel, text: str, tokens: int, seed: int, threads: int
) -> Compared:
    """Both readings of the text's first `tokens`, 0: all, in chunks as `evaluate` makes them."""
    length = min(LONGEST_CHUNK, store.architecture.max_positions)
    with Bars() as bars, torch.no_grad(), DenseModel(store, threads) as model:
        sequences, size = chunks(load_tokenizer(store), text, length, tokens or None)
        reference = theirs.score(sequences, lambda done, total: bars.tell("transformers", done, total))
        ours = score(model, sequences, None, lambda done, total: bars.tell("ours", done, total))
    furthest = max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(reference, ours, strict=True))
    report = compare_text(reference, ours, size, seed)
    return Compared(
        report.tokens,
        their_nats_per_token=report.dense_nats_per_token,
        our_nats_per_token=report.sparse_nats_per_token,
        their_perplexity=report.dense_perplexity,
        our_perplexity=report.sparse_perplexity,
        ratio=report.ratio,
        agreement=report.agreement,
        furthest=furthest,
    )


def table(found: Compared) -> Table:
    shown = Table(f"{found.tokens:,} tokens", "transformers", "ours")
    shown.add_row("nats a token", f"{found.their_nats_per_token:.6f}", f"{found.our_nats_per_token:.6f}")
    shown.add_row("perplexity", f"{found.their_perplexity:.4f}", f"{found.our_perplexity:.4f}")
    shown.add_row("perplexity, change", "", f"{found.ratio.value - 1:+.4%}")
    shown.add_row("same next token", "", found.agreement.percent())
    shown.add_row("furthest log-probability", "", f"{found.furthest:.2g}")
    return shown


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
