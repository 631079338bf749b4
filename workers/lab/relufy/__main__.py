"""`python -m workers.lab.relufy`: the program behind `run.py relufy`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer

from pipeline import program
from pipeline.console import say, tables
from pipeline.cores import thread_count
from pipeline.models.names import find_source
from pipeline.progress import Progress
from pipeline.status import waiting
from storage.errors import CheckpointError, UsageError
from storage.tokenizer import TOKENIZER, texts
from workers.lab.evaluation.bars import Bars
from workers.lab.relufy.distil import Terms
from workers.lab.relufy.measure import Measured, Report, measure
from workers.lab.relufy.train import Recipe, train
from workers.lab.training.texts import documents

HELD_OUT = 16  # one token of the text in so many is held out, where no other text is given


def main(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's directory, or a Hugging Face id.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="Directory for the run and its OUT/checkpoint.", metavar="OUT")],
    text: Annotated[Path, typer.Option(help="To train on: plain text or JSON lines; may be .xz.")],
    held_out: Annotated[
        Path | None,
        typer.Option(help="To measure on. [default: the end of the same text]", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=2)] = 8192,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 512,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate.", min=0)] = 3e-4,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the original.", min=0)] = 1.0,
    layers: Annotated[float, typer.Option(help="Weight of the FFNs' errors.", min=0)] = 1.0,
    zeros: Annotated[float, typer.Option(help="Share of zeros aimed at.", min=0.5, max=0.99)] = 0.92,
    lora: Annotated[int, typer.Option(help="Rank of adapters; 0: all parameters.", min=0)] = 0,
    control: Annotated[
        bool, typer.Option("--control", help="Keep the old activation: what the same tokens do without ReLU.")
    ] = False,
    beside: Annotated[
        Path | None,
        typer.Option(help="Directory of a finished control, to compare with.", show_default=False),
    ] = None,
    test_tokens: Annotated[int, typer.Option(help="Tokens to measure on.", min=2)] = 65536,
    device: Annotated[str, typer.Option(help="torch's: cpu, cuda, mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between two states to go on from.", min=1)] = 25,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows, and of adapters.", min=0)] = 0,
) -> None:
    """Swap a model's smooth activation for ReLU, and distil it against itself; a stopped run goes on."""
    other = None if beside is None else Report.read(beside)
    torch.set_num_threads(thread_count(threads))
    source = find_source(model)
    if source.store is not None or source.file is not None:
        raise UsageError("relufy trains a Hugging Face checkpoint, not a store or a GGUF file")
    checkpoint = source.checkpoint()
    recipe = Recipe(steps, tokens, length, rate, kl, layers, zeros, control, lora, seed)
    wanted = recipe.steps * recipe.rows
    with waiting(f"reading {text.name}"):
        rows = _rows(text, checkpoint, length, wanted + max(1, test_tokens // length))
        if held_out is None:
            keep = min(max(1, test_tokens // length), max(1, len(rows) // HELD_OUT))
            rows, test = rows[:-keep], rows[-keep:]
        else:
            test = _rows(held_out, checkpoint, length, max(1, test_tokens // length))
    if not len(rows):
        raise UsageError(f"{text} is too short: it has one row of {length} tokens")
    with Progress(f"distilling {checkpoint.name}", "steps") as progress:
        told = _Told(steps, progress)
        trained = train(checkpoint, rows[:wanted], recipe, out, device, save_every, told)
    with Bars() as bars:
        before = measure(checkpoint, test, device, lambda *at: bars.tell("original", *at))
        after = measure(trained, test, device, lambda *at: bars.tell("tuned", *at))
    report = Report((held_out or text).name, before, after)
    report.write(out)
    _print(report, other, trained)


class _Told:
    """How far the training is, and what it has come to, every twentieth of the steps."""

    def __init__(self, steps: int, progress: Progress) -> None:
        self._steps, self._every = steps, max(1, steps // 20)
        self._progress = progress

    def __call__(self, done: int, terms: Terms, shares: list[float]) -> None:
        self._progress("training", done, self._steps)
        if done % self._every and done != self._steps:
            return
        zeros = f", zeros {1 - float(np.mean(shares)):.1%}" if any(shares) else ""
        say(
            f"step {done}/{self._steps}: {terms.loss:.3f} nats, divergence {terms.divergence:.4f}, "
            f"FFN error {terms.error:.3f}{zeros}"
        )


def _rows(text: Path, checkpoint: Path, length: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many rows of `length` + 1 tokens, the last shared with the next, in the text's order."""
    from tokenizers import Tokenizer

    found = texts(checkpoint).get(TOKENIZER)
    if found is None:
        raise CheckpointError(f"{checkpoint} has no tokenizer")
    tokenizer, ids = Tokenizer.from_buffer(found), list[int]()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        for document in documents(text):
            ids += tokenizer.encode(document).ids
            if len(ids) > most * length:
                break
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"{text} cannot be read as text: {error}") from error
    count = min(most, (len(ids) - 1) // length)
    if count < 1:
        raise UsageError(f"{text} has {len(ids)} tokens, too few for a row of {length}")
    stream = np.array(ids[: count * length + 1], np.int64)
    return np.stack([stream[at * length : (at + 1) * length + 1] for at in range(count)])


def _print(report: Report, other: Report | None, trained: Path) -> None:
    from rich.table import Table

    shown = Table("layer", "exact zeros", "dead neurons")
    for index, (zeros, dead) in enumerate(zip(report.tuned.zeros, report.tuned.dead, strict=True)):
        shown.add_row(str(index), f"{zeros:.1%}", f"{dead:.1%}")
    shown.add_row("all", f"{np.mean(report.tuned.zeros):.1%}", f"{np.mean(report.tuned.dead):.1%}")
    console = tables()
    console.print(shown)
    lines = [("original", report.original), ("tuned", report.tuned)]
    if other is not None:
        lines.insert(1, ("control", other.tuned))
    for name, one in lines:
        console.print(f"{name}: perplexity {one.perplexity:.3f}{_apart(report.tuned, one)}")
    say(f"{trained} is ready: run.py convert {trained} STORE")


def _apart(tuned: Measured, one: Measured) -> str:
    if one is tuned or len(one.nats) != len(tuned.nats):
        return ""
    return f"; the tuned one has {tuned.beside(one).percent()} more"


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
