"""What one evaluation found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table

from workers.lab.evaluation.statistics import Estimate, paired_difference, proportion, ratio_of_perplexities
from workers.lab.evaluation.tasks import Item
from workers.lab.offline.scoring import Scored


@dataclass(frozen=True, slots=True)
class TextReport:
    """Perplexity of a text, dense and sparse."""

    tokens: int
    bytes: int
    dense_nats_per_token: float
    sparse_nats_per_token: float
    dense_perplexity: float
    sparse_perplexity: float
    ratio: Estimate  # sparse ÷ dense perplexity
    agreement: Estimate  # share of tokens whose likeliest next token is the same

    @property
    def dense_nats_per_byte(self) -> float:
        return self.dense_nats_per_token * self.tokens / self.bytes


@dataclass(frozen=True, slots=True)
class TaskReport:
    """Accuracy on one task, dense and sparse, on the same items."""

    task: str
    items: int
    dense: Estimate
    sparse: Estimate
    difference: Estimate  # sparse − dense, paired
    dense_normalised: Estimate | None  # log-probability per byte of the answer
    sparse_normalised: Estimate | None


def compare_text(dense: Sequence[Scored], sparse: Sequence[Scored], text_bytes: int, seed: int) -> TextReport:
    """Chunks of one text, scored both ways."""
    tokens = np.array([len(one.logprobs) for one in dense])
    dense_nats = np.array([-one.logprobs.sum() for one in dense])
    sparse_nats = np.array([-one.logprobs.sum() for one in sparse])
    same = [np.equal(a.likeliest, b.likeliest) for a, b in zip(dense, sparse, strict=True)]
    agreeing = int(np.concatenate(same).sum())
    total = int(tokens.sum())
    return TextReport(
        tokens=total,
        bytes=text_bytes,
        dense_nats_per_token=float(dense_nats.sum() / total),
        sparse_nats_per_token=float(sparse_nats.sum() / total),
        dense_perplexity=float(np.exp(dense_nats.sum() / total)),
        sparse_perplexity=float(np.exp(sparse_nats.sum() / total)),
        ratio=ratio_of_perplexities(sparse_nats, dense_nats, tokens, seed),
        agreement=proportion(agreeing, total),
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """Per item, whether the answer was right: `[items]` bool."""

    plain: npt.NDArray[np.bool_]
    normalised: npt.NDArray[np.bool_] | None


def judge(items: Sequence[Item], scored: Sequence[Sequence[tuple[float, bool]]]) -> Judged:
    """Right answers from each choice's (log-probability, whether it is the greedy continuation)."""
    if all(len(item.choices) == 1 for item in items):
        return Judged(np.array([choices[0][1] for choices in scored]), None)
    plain, normalised = [], []
    for item, choices in zip(items, scored, strict=True):
        sums = np.array([logprob for logprob, _ in choices])
        lengths = np.array([len(choice.encode()) for choice in item.choices])
        plain.append(int(sums.argmax()) == item.gold)
        normalised.append(int((sums / lengths).argmax()) == item.gold)
    return Judged(np.array(plain), np.array(normalised))


def compare_task(task: str, dense: Judged, sparse: Judged) -> TaskReport:
    """Both models' accuracy on one task."""

    def share(right: npt.NDArray[np.bool_] | None) -> Estimate | None:
        return None if right is None else proportion(int(right.sum()), len(right))

    dense_share, sparse_share = share(dense.plain), share(sparse.plain)
    assert dense_share is not None
    assert sparse_share is not None
    return TaskReport(
        task=task,
        items=len(dense.plain),
        dense=dense_share,
        sparse=sparse_share,
        difference=paired_difference(sparse.plain, dense.plain),
        dense_normalised=share(dense.normalised),
        sparse_normalised=share(sparse.normalised),
    )


def text_table(report: TextReport) -> Table:
    table = Table("", "dense", "sparse")
    table.add_row("nats a token", f"{report.dense_nats_per_token:.4f}", f"{report.sparse_nats_per_token:.4f}")
    table.add_row("perplexity", f"{report.dense_perplexity:.4f}", f"{report.sparse_perplexity:.4f}")
    table.add_row("perplexity, change", "", report.ratio.beyond(1).percent())
    table.add_row("next-token agreement", "", report.agreement.percent())
    return table


def task_table(reports: Sequence[TaskReport]) -> Table:
    table = Table("task", "items", "dense", "sparse", "sparse − dense", "dense, per byte", "sparse, per byte")
    for report in reports:
        optional = (report.dense_normalised, report.sparse_normalised)
        table.add_row(
            report.task,
            f"{report.items:,}",
            report.dense.percent(),
            report.sparse.percent(),
            report.difference.percent(),
            *("–" if one is None else one.percent() for one in optional),
        )
    return table
