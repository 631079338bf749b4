"""How good predictions are: recall, precision, false negatives and false positives.

False negatives are missed ÷ active, false positives wrongly predicted ÷ inactive (paper, §3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Counts:
    """Neurons over all tokens that were looked at."""

    hit: int = 0  # active and predicted
    missed: int = 0  # active, not predicted
    wrong: int = 0  # predicted, not active
    silent: int = 0  # neither

    @classmethod
    def of(cls, predicted: Tensor, active: Tensor) -> Counts:
        """Of two bool tensors of one shape."""
        hit = int((predicted & active).sum())
        wrong = int(predicted.sum()) - hit
        missed = int(active.sum()) - hit
        return cls(hit, missed, wrong, active.numel() - hit - wrong - missed)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.hit + other.hit,
            self.missed + other.missed,
            self.wrong + other.wrong,
            self.silent + other.silent,
        )

    @property
    def recall(self) -> float:
        return _share(self.hit, self.hit + self.missed, 1.0)

    @property
    def precision(self) -> float:
        return _share(self.hit, self.hit + self.wrong, 1.0)

    @property
    def false_negatives(self) -> float:
        return _share(self.missed, self.hit + self.missed, 0.0)

    @property
    def false_positives(self) -> float:
        return _share(self.wrong, self.wrong + self.silent, 0.0)

    @property
    def active(self) -> float:
        """Share of neurons active per token."""
        return _share(self.hit + self.missed, self.hit + self.missed + self.wrong + self.silent, 0.0)

    @property
    def predicted(self) -> float:
        """Share of neurons predicted per token."""
        return _share(self.hit + self.wrong, self.hit + self.missed + self.wrong + self.silent, 0.0)


def _share(part: int, whole: int, empty: float) -> float:
    return part / whole if whole else empty


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One map's quality on held-out text; shares, not per cent."""

    layer: int
    lookahead: int
    rank: int
    active: float
    predicted: float
    recall: float
    precision: float
    false_negatives: float
    false_positives: float

    @classmethod
    def of(cls, layer: int, lookahead: int, rank: int, counts: Counts) -> LayerReport:
        return cls(
            layer,
            lookahead,
            rank,
            round(counts.active, 5),
            round(counts.predicted, 5),
            round(counts.recall, 5),
            round(counts.precision, 5),
            round(counts.false_negatives, 5),
            round(counts.false_positives, 5),
        )


def count(batches: Iterable[tuple[Tensor, Tensor]]) -> Counts:
    """Over (scores, active) of any number of batches, `[n, d_ff]` float32 and bool."""
    total = Counts()
    for scores, active in batches:
        total += Counts.of(scores > 0, active)
    return total


def to_json(reports: Sequence[LayerReport], **more: object) -> dict[str, object]:
    """For the file's metadata: the maps in order, and what they were made from."""
    return {**more, "layers": [asdict(report) for report in reports]}


def table(reports: Sequence[LayerReport]) -> Table:
    """For people."""
    shown = Table(title="On held-out text, per cent; missed ÷ active, wrong ÷ inactive")
    for heading in ("layer", "ahead", "rank", "active", "chosen", "recall", "prec."):
        shown.add_column(heading, justify="right")
    shown.add_column("missed", justify="right")
    shown.add_column("wrong", justify="right")
    for one in reports:
        shares = (one.active, one.predicted, one.recall, one.precision)
        shown.add_row(
            str(one.layer),
            str(one.lookahead),
            str(one.rank),
            *(f"{100 * share:.2f}" for share in (*shares, one.false_negatives, one.false_positives)),
        )
    return shown


def threshold(scores: Tensor, active: Tensor, false_negatives: float) -> float:
    """The score above which all but this share of the active neurons lie; 0 without any active.

    `scores` and `active` `[n, d_ff]`.
    """
    positive = scores[active]
    below = int(false_negatives * positive.numel())
    if not positive.numel() or below >= positive.numel():
        return 0.0
    lowest = float(positive.kthvalue(below + 1).values)
    return float(torch.nextafter(torch.tensor(lowest), torch.tensor(-torch.inf)))
