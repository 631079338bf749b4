"""The report on routing for people: a line a layer, and the means beside published ones."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipeline.console import tables
from workers.lab.synthesis.mixture.routing import (
    AHEAD,
    HOTTEST,
    LAGS,
    PUBLISHED,
    WINDOW,
    RoutingReport,
    summary,
)
from workers.lab.synthesis.sources import Weights

COLUMNS = {
    **{f"reuse_{lag}": f"reuse, {lag} back" for lag in LAGS},
    "chance": "by chance",
    "new": f"new, window {WINDOW}",
    "touched": "touched, of all",
    "hottest": f"top {HOTTEST}'s share",
    **{f"recall_{ahead}": f"recall, {ahead} ahead" for ahead in AHEAD},
}


def print_table(weights: Weights, tokens: int, reports: Sequence[RoutingReport]) -> None:
    """Print to standard output; the table of a synthetic model says so in its title."""
    kind = "SYNTHETIC " if weights.synthetic else ""
    table = Table(title=f"{kind}{weights.name}, {tokens} tokens: its routing, %")
    table.add_column("layer")
    for column in COLUMNS.values():
        table.add_column(column, justify="right")
    for report in reports:
        table.add_row(str(report.layer), *_cells(summary([report])))
    table.add_section()
    table.add_row("mean", *_cells(summary(reports)))
    published = PUBLISHED.get(weights.architecture.family)
    if published:
        table.add_row("published", *_cells(published))
    table.caption = (
        "new: experts that none of the tokens of the window before had; recall: of a layer's experts, "
        "those that its router names when it reads an earlier layer's input"
    )
    tables().print(table)


def _cells(values: dict[str, float]) -> list[str]:
    return ["" if values.get(name) is None else f"{100 * values[name]:.1f}" for name in COLUMNS]
