"""Settings beside each other on one text: what each costs in quality, and what it reads from flash.

Every point runs the text once with its predictions (`offline/record.py`), which gives perplexity and
agreement against the dense model and, per layer, the predictors' errors; the recorded sets then go
through the ring's own residency, which gives the bytes per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.planner.resolve import predictor_bytes
from storage.errors import UsageError
from workers.cache.policies import make_policy
from workers.lab.evaluation.report import compare_text
from workers.lab.evaluation.statistics import Estimate
from workers.lab.offline.chooser import RingChooser, make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.forward import Sets, forward
from workers.lab.offline.record import BLOCK_TOKENS, Recorder
from workers.lab.offline.replay import replay
from workers.lab.offline.scoring import Scored, score_rows
from workers.lab.offline.trace import Trace
from workers.lab.pictures import picture
from workers.lab.training.report import Counts

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting's price and quality."""

    name: str
    settings: tuple[str, ...]
    capacity: float  # slots, as a share of the FFN
    ratio: Estimate  # perplexity ÷ the dense one's
    agreement: Estimate  # next tokens that are the dense model's
    active: float  # share of neurons per token
    predicted: float
    false_negatives: float  # missed ÷ active
    false_positives: float  # wrongly predicted ÷ inactive
    hit_rate: float
    bytes_per_token: float
    wasted_bytes_per_token: float  # of them, by guesses that were not wanted
    predictor_bytes: int


class _Tally:
    """Adds up sets of neurons for a report."""

    def __init__(self, recorder: Recorder) -> None:
        self.counts = Counts()
        self._recorder = recorder

    def see(self, layer: int, sets: Sets) -> None:
        self._recorder.see(layer, sets)
        if sets.predicted is not None:
            self.counts += Counts.of(sets.predicted, sets.active)


def run(
    model: DenseModel, chooser: RingChooser | None, rows: npt.NDArray[np.int64]
) -> tuple[list[Scored], Trace, Counts]:
    """One pass over `rows` `[n, length]`: scores, sets, and the predictors' errors."""
    recorder = Recorder(model.store, rows.size, chooser)
    tally = _Tally(recorder)
    scored: list[Scored] = []
    step = max(1, BLOCK_TOKENS // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        x = forward(model, block, chooser, tally.see)
        scored += [score_rows(model, one[:-1], row[1:]) for one, row in zip(x, block, strict=True)]
        recorder.next_block(block.size)
    return scored, recorder.trace({}), tally.counts


def measure(
    model: DenseModel,
    points: Sequence[tuple[str, Config, tuple[str, ...]]],
    rows: npt.NDArray[np.int64],
    seed: int,
    progress: Progress = lambda stage, done, total: None,
) -> list[Point]:
    """Every point, on the same tokens. `points`: name, configuration and what was set."""
    if model.store.architecture.mixture:
        raise UsageError(
            f"{model.store.manifest.name} is a mixture of experts: points compare sets of neurons, and its "
            "routers choose whole experts exactly"
        )
    for _, chosen, _ in points:  # what cannot be is refused before the work
        make_chooser(model.store, chosen, in_order=True)
        plan(model.store, chosen, available=0)
    progress("points", 0, len(points) + 1)
    dense, active, _ = run(model, None, rows)
    found = []
    for number, (name, chosen, settings) in enumerate(points):
        progress("points", number + 1, len(points) + 1)
        chooser = make_chooser(model.store, chosen, in_order=True)
        scored, trace, counts = (dense, active, Counts()) if chooser is None else run(model, chooser, rows)
        found.append(_point(model, name, chosen, settings, dense, scored, trace, counts, seed))
    progress("points", len(points) + 1, len(points) + 1)
    return found


def _point(
    model: DenseModel,
    name: str,
    config: Config,
    settings: tuple[str, ...],
    dense: list[Scored],
    scored: list[Scored],
    trace: Trace,
    counts: Counts,
    seed: int,
) -> Point:
    text = compare_text(dense, scored, 1, seed)
    # As where a model does not fit: bytes a token must not depend on the machine that counts them.
    divided = plan(model.store, config, available=0).plan
    slots = divided.slots
    outcome = replay(
        trace, slots, lambda layer, slots: make_policy(trace.d_ff, config.cache), warm_up=trace.tokens // 8
    )
    used = np.bitwise_count(trace.used).sum() / (trace.layers * trace.tokens * trace.d_ff)
    every = divided.forecast.every
    neurons = trace.layers * trace.d_ff
    capacity = sum(slots) / neurons
    return Point(
        name=name,
        settings=settings,
        capacity=capacity,
        ratio=text.ratio,
        agreement=text.agreement,
        active=float(np.bitwise_count(trace.active).sum() / (trace.layers * trace.tokens * trace.d_ff)),
        predicted=1.0 if every else float(used),
        false_negatives=counts.false_negatives,
        false_positives=1.0 if every else counts.false_positives,
        hit_rate=capacity if every else outcome.hit_rate,
        bytes_per_token=(
            (neurons - sum(slots)) * trace.stride if every else outcome.reads * trace.stride / outcome.tokens
        ),
        wasted_bytes_per_token=0.0 if every else outcome.wasted * trace.stride / outcome.tokens,
        predictor_bytes=predictor_bytes(model.store, config),
    )


def table(points: Sequence[Point]) -> Table:
    """A point a row."""
    found = Table(
        "point",
        "perplexity, change",
        "agreement",
        "predicted",
        "false neg.",
        "false pos.",
        "hit rate",
        "KB a token",
        "wasted",
    )
    for one in points:
        found.add_row(
            one.name,
            _change(one.ratio.beyond(1)),
            f"{one.agreement.value:.2%}",
            f"{one.predicted:.1%}",
            f"{one.false_negatives:.1%}",
            f"{one.false_positives:.1%}",
            f"{one.hit_rate:.1%}",
            f"{one.bytes_per_token / 1e3:,.0f}",
            f"{one.wasted_bytes_per_token / 1e3:,.0f}",
        )
    return found


def _change(shift: Estimate) -> str:
    """With its interval, where there is one."""
    if shift.low is None or shift.high is None:
        return f"{shift.value:+.2%}"
    return f"{shift.value:+.2%} ({shift.low:+.2%} to {shift.high:+.2%})"


def _spread(found: Estimate) -> tuple[float, float]:
    """Of the error bar, below and above."""
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    return found.value - low, high - found.value


def draw(points: Sequence[Point], path: Path) -> None:
    """The dial: perplexity's change against bytes per token; and the predictors' two errors."""
    with picture(path, 1, 2, size=(11, 4.5)) as [(dial, errors)]:
        ordered = sorted(points, key=lambda one: one.bytes_per_token)
        shifts = 100 * np.array([one.ratio.value - 1 for one in ordered])
        spread = 100 * np.array([_spread(one.ratio) for one in ordered]).T
        kilobytes = [one.bytes_per_token / 1e3 for one in ordered]
        dial.errorbar(kilobytes, shifts, yerr=spread, marker="o", ms=4, lw=1, capsize=2)
        dial.axhline(0.5, color="grey", ls="--", lw=0.8)
        dial.set_xlabel("kilobytes read per token")
        dial.set_ylabel("perplexity against dense, % (0.5 dashed)")
        errors.plot(
            [100 * one.false_positives for one in ordered],
            [100 * one.false_negatives for one in ordered],
            marker="o",
            ms=4,
            lw=1,
        )
        errors.plot([7], [5], marker="*", ms=12, color="black", ls="", label="OPT-6.7B in the paper")
        errors.set_xlabel("false positives, % of inactive")
        errors.set_ylabel("false negatives, % of active")
        errors.legend(fontsize=8)
        for one, x, y in zip(ordered, kilobytes, shifts, strict=True):
            dial.annotate(one.name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
            place = (100 * one.false_positives, 100 * one.false_negatives)
            errors.annotate(one.name, place, textcoords="offset points", xytext=(4, 4), fontsize=7)
        for axes in (dial, errors):
            axes.grid(alpha=0.3)
