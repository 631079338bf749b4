"""What predictors of each rank could do: `python -m workers.lab.training.frontier --store DIR --text FILE`.

Activations are recorded once; then every layer gets one map per look-ahead and rank, calibrated as
`train-predictor` does it. One offset to all their thresholds, as `predictor.threshold`, moves along a curve:
fewer false negatives for more false positives.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.table import Table

from pipeline import program
from pipeline.commands.options import Picture
from pipeline.console import tables
from pipeline.cores import thread_count
from pipeline.progress import Progress
from storage.errors import UsageError
from storage.lock import locked
from storage.store import Store
from workers.lab.pictures import picture
from workers.lab.training import activations, texts
from workers.lab.training.activations import Activations, Samples
from workers.lab.training.job import Fitting, Split, TrainingJob
from workers.lab.training.lowmap import LowMap

OFFSETS = torch.linspace(-6.0, 6.0, 241)  # of the thresholds: log-odds
PAPER = (0.05, 0.07)  # false negatives and positives of OPT-6.7B's predictors in "LLM in a flash"
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Curve:
    """One look-ahead and rank over all layers, on held-out text."""

    lookahead: int
    rank: int
    share: float  # of the FFN's bytes, for these maps
    false_negatives: tuple[float, ...]  # ascending, one for each of OFFSETS
    false_positives: tuple[float, ...]

    def price(self, false_negatives: float) -> float:
        """False positives where this share of the active neurons is missed, interpolated."""
        return float(np.interp(false_negatives, self.false_negatives, self.false_positives))


@dataclass(slots=True)
class Passing:
    """Neurons whose score passes each of OFFSETS."""

    active: torch.Tensor = field(default_factory=lambda: torch.zeros(len(OFFSETS), dtype=torch.int64))
    inactive: torch.Tensor = field(default_factory=lambda: torch.zeros(len(OFFSETS), dtype=torch.int64))
    all_active: int = 0
    all_inactive: int = 0

    def see(self, made: LowMap, held_out: Samples) -> None:
        """Count one layer's held-out tokens."""
        for start in range(0, len(held_out), TOKENS_AT_ONCE):
            inputs, active = held_out.rows(slice(start, start + TOKENS_AT_ONCE))
            scores = made.scores(inputs)
            self.active += _passing(scores[active])
            self.inactive += _passing(scores[~active])
            self.all_active += int(active.sum())
            self.all_inactive += int((~active).sum())

    def curve(self, lookahead: int, rank: int, share: float) -> Curve:
        missed = 1 - self.active.double() / max(1, self.all_active)
        wrong = self.inactive.double() / max(1, self.all_inactive)
        return Curve(lookahead, rank, share, tuple(missed.tolist()), tuple(wrong.tolist()))


def _passing(scores: torch.Tensor) -> torch.Tensor:
    """How many scores lie above each of OFFSETS, `[offsets]`."""
    places = torch.bucketize(scores, OFFSETS)  # offsets below the score
    exact = torch.bincount(places, minlength=len(OFFSETS) + 1)
    return exact.flip(0).cumsum(0).flip(0)[1:]


def measure(
    store: Store,
    recorded: Activations,
    split: Split,
    jobs: Sequence[TrainingJob],
    ranks: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Curve]:
    """A curve for every look-ahead, that is a job's, and rank."""
    layers = len(store.layout.layers)
    curves: list[Curve] = []
    for job in jobs:
        lookahead, fitting = job.lookahead, Fitting(store, recorded, split, job)
        for rank in ranks:
            passing = Passing()
            for layer in range(layers):
                done = len(curves) * layers + layer
                progress(done, len(jobs) * len(ranks) * layers)
                made = fitting.fit(layer, lookahead, rank)
                held_out = recorded.samples(layer, lookahead).part(split.validation, split.held_out)
                passing.see(made, held_out)
            neurons = store.layout.total_units
            size = 2 * rank * (layers * store.architecture.d_model + neurons) + 4 * (neurons + layers)
            share = size / store.layout.useful_bytes
            curves.append(passing.curve(lookahead, rank, share))
    return curves


def table(curves: Sequence[Curve]) -> Table:
    found = Table("look-ahead", "rank", "of the FFN's bytes", f"false positives at {PAPER[0]:.0%} missed")
    for one in curves:
        price = f"{one.price(PAPER[0]):.1%}"
        found.add_row(str(one.lookahead), str(one.rank), f"{one.share:.1%}", price)
    return found


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Both errors of every rank, a panel for each look-ahead."""
    lookaheads = list(dict.fromkeys(one.lookahead for one in curves))
    size = (1 + 4.7 * len(lookaheads), 4.5)
    with picture(path, 1, len(lookaheads), size=size, layout="tight", sharey=True) as [panels]:
        for axes, lookahead in zip(panels, lookaheads, strict=True):
            for one in curves:
                if one.lookahead == lookahead:
                    label = f"rank {one.rank}, {one.share:.0%} of the FFN"
                    axes.plot(
                        _percent(one.false_positives), _percent(one.false_negatives), lw=1.2, label=label
                    )
            axes.plot(
                [100 * PAPER[1]], [100 * PAPER[0]], marker="*", ms=12, color="black", ls="", label="the paper"
            )
            axes.set_title(f"look-ahead {lookahead}", fontsize=10)
            axes.set_xlabel("false positives, % of inactive")
            axes.set_xlim(0, 50)
            axes.set_ylim(0, 20)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("false negatives, % of active")
        panels[-1].legend(fontsize=8)


def _percent(shares: Sequence[float]) -> npt.NDArray[np.float64]:
    return 100 * np.array(shares)


def main(
    store_path: Annotated[Path, typer.Option("--store", help="The converted model's directory.")],
    text: Annotated[Path, typer.Option(help='Text to train on, or .jsonl with "text"; may be .xz.')],
    held_out: Annotated[
        Path | None, typer.Option(help="Text for the curves; without: the last twentieth of TEXT.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks to compare, separated by commas.")] = "16,36,64,96,128",
    lookaheads: Annotated[str, typer.Option(help="Look-aheads to compare, separated by commas.")] = "0,1",
    method: Annotated[str, typer.Option(help="trained, regression (no training) or svd.")] = "trained",
    tokens: Annotated[int, typer.Option(help="Most tokens of TEXT to use.", min=1)] = 40_960,
    threads: Annotated[int, typer.Option(help="Threads; 0: one for each CPU.", min=0)] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Directory for activations; without: beside the store, removed at the end."),
    ] = None,
    picture: Picture = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure both errors of predictors over ranks and thresholds."""
    store = Store.open(store_path)
    jobs = [
        TrainingJob(lookahead=k, method=method) for k in _numbers(lookaheads, 0, len(store.layout.layers) - 1)
    ]
    wanted = _numbers(ranks, 1, store.architecture.d_model)
    torch.set_num_threads(thread_count(threads))
    rows, more = texts.two(text, held_out, store, tokens)
    split = Split.of(len(rows), len(more), rows.shape[1])
    place = work or store.path.with_name(f"{store.path.name}.frontier")
    place.mkdir(parents=True, exist_ok=True)
    with locked(place, "measurement"), Progress("measuring", "done") as progress:
        recorded = activations.record(
            store,
            np.concatenate([rows, more]),
            place / "activations",
            torch.get_num_threads(),
            progress.counting("activations"),
        )
        curves = measure(
            store,
            recorded,
            split,
            jobs,
            wanted,
            progress.counting("maps"),
        )
        if work is None:
            shutil.rmtree(place)
    if as_json:
        print(json.dumps({"offsets": OFFSETS.tolist(), "curves": [asdict(one) for one in curves]}))
    else:
        tables().print(table(curves))
    if picture:
        draw(curves, picture)


def _numbers(text: str, least: int, most: int) -> list[int]:
    """Whole numbers, separated by commas. Raises UsageError."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and least <= int(word) <= most for word in words):
        raise UsageError(f"{text!r} is no list of whole numbers from {least} to {most}")
    return [int(word) for word in words]


def run() -> int:
    """The command line's exit status."""
    return program.single(main)


if __name__ == "__main__":
    sys.exit(run())
