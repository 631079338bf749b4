"""The report for people: a table a layer, and the means beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from pipeline.console import tables
from workers.lab.synthesis.measure import PAPER, WINDOW, WINDOWS, LayerReport
from workers.lab.synthesis.sources import Weights


def print_table(
    weights: Weights, tokens: int, rank: int, reports: Sequence[LayerReport], summary: dict[str, Any]
) -> None:
    """Print to standard output; every table of a synthetic model says so in its title."""
    kind = "SYNTHETIC " if weights.synthetic else ""
    title = f"{kind}{weights.name}, {tokens} tokens, SVD of rank {rank}"
    console = tables()
    console.print(_by_layer(title, reports))
    console.print(_by_window(f"{title}: windows", reports))
    console.print(_against_paper(f"{title}: means", PAPER.get(weights.architecture.family, {}), summary))
    if not weights.architecture.sparse:
        console.print(
            f"{weights.name} uses {weights.architecture.activation}: its activations are never zero, "
            "and 'active' counts neurons whose activation function is given a positive number."
        )


def _by_layer(title: str, reports: Sequence[LayerReport]) -> Table:
    table = Table(title=f"{title}; shares of the FFN in %, window {WINDOW}")
    for name in (
        "layer",
        "active",
        "new",
        "cosine",
        "recall 0",
        "÷ active",
        "new",
        "recall 1",
        "2",
        "÷ active 1",
        "2",
    ):
        table.add_column(name, justify="right")
    place = WINDOWS.index(WINDOW)
    for report in reports:
        at = report.predictions
        table.add_row(
            str(report.layer),
            _percent(report.active),
            _percent(report.new[place]),
            _number(report.cosine, 3),
            _number(at[0].recall, 3),
            _number(at[0].over, 2),
            _percent(at[0].new[place]),
            *(_number(at[k].recall_same if k in at else None, 3) for k in (1, 2)),
            *(_number(at[k].over if k in at else None, 2) for k in (1, 2)),
        )
    table.caption = (
        "recall 1, 2: at look-ahead 0's threshold; ÷ active 1, 2: at thresholds of their own for 5 % misses"
    )
    return table


def _by_window(title: str, reports: Sequence[LayerReport]) -> Table:
    """Means over layers, for each window."""
    table = Table(title=f"{title}, shares of the FFN in %")
    table.add_column("window")
    for window in WINDOWS:
        table.add_column(str(window), justify="right")
    count = len(reports)

    def row(name: str, values: Sequence[Sequence[float]]) -> None:
        table.add_row(name, *(_percent(sum(column) / count) for column in zip(*values, strict=True)))

    row("new, true", [report.new for report in reports])
    row("new, predicted", [report.predictions[0].new for report in reports])
    row("union, true", [report.union for report in reports])
    row("union, predicted", [report.predictions[0].union for report in reports])
    return table


def _against_paper(title: str, paper: dict[str, float], summary: dict[str, Any]) -> Table:
    table = Table(title=title)
    for name in ("", "look-ahead 0", "1", "2", "paper"):
        table.add_column(name, justify="right" if name else "left")
    ahead = summary["lookahead"]

    def row(name: str, key: str, show: Any, published: str = "") -> None:
        values = [show(ahead[k][key]) for k in ("0", "1", "2")]
        table.add_row(name, *values, show(paper.get(published)) if published else "")

    table.add_row("active, % of the FFN", _percent(summary["active"]), "", "", _percent(paper.get("active")))
    table.add_row("new per token, true sets, %", _percent(summary["new"]), "", "", "")
    row("new per token, predicted sets, %", "new", _percent, "new")
    row("union of the window, predicted, %", "union", _percent, "union")
    row("predicted, %", "predicted", _percent, "predicted")
    row("predicted ÷ active", "over", lambda value: _number(value, 2), "over")
    row("recall", "recall", lambda value: _number(value, 3), "recall")
    row("false positives, % of the inactive", "false_positives", _percent)
    row("recall at look-ahead 0's threshold", "recall_same_threshold", lambda value: _number(value, 3))
    row("predicted at that threshold, %", "predicted_same_threshold", _percent)
    table.add_row("cosine of consecutive FFN inputs", _number(summary["cosine"], 3), "", "", "")
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
