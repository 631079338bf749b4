"""The figures of --watch, on a terminal and as a line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.console import size
from pipeline.watching.figures import Figures

BAR = 20  # columns
TEXT_LINES = 8  # of the answer that are shown above the figures
HEIGHTS = "▁▂▃▄▅▆▇█"
LITTLE, MUCH = 0.5, 0.85  # of what a layer wanted: below the first red, above the second green


def rendered(found: Figures, text: str = "", width: int = 80) -> RenderableType:
    """For a terminal of so many columns; `text`: the answer's, of which the end is shown."""
    workers = Table.grid(padding=(0, 2))
    for worker in found.workers:
        workers.add_row(worker.name, _bar(worker.busy), f"{worker.busy:>4.0%} busy", worker.doing)
    figures = Table.grid(padding=(0, 2))
    for name, value in _rows(found):
        figures.add_row(name, value)
    figures.add_row("hits by layer", strip(found.hits_by_layer))
    parts: list[RenderableType] = []
    if text:
        parts += [Text(tail(text, width)), Text("─" * min(width, 78), style="dim")]
    return Group(*parts, workers, figures)


def _rows(found: Figures) -> list[tuple[str, str]]:
    """Name and value of everything but the layers' strip."""
    speed = f"{found.tokens} so far, {found.tokens_per_second:.1f} a second"
    rows = [("tokens", f"prompt: {found.prompt}" if found.prompt else speed), ("reads", _reads(found))]
    if found.hit_rate is not None:
        rows.append(("in memory", f"{found.hit_rate:.1%} of what tokens wanted"))
    rows.append(("memory", _memory(found)))
    if found.recall is not None:
        rows.append(("recall", f"{found.recall:.2%} of the active neurons were predicted"))
    return rows


def _reads(found: Figures) -> str:
    beside = ""
    if found.ceiling:
        share = found.read_rate / found.ceiling
        beside = f" of this disk's {size(found.ceiling)}/s ({share:.0%})"
    return f"{size(found.read_bytes)} so far, {size(found.read_rate)}/s{beside}"


def _memory(found: Figures) -> str:
    if found.budget is None:
        return f"{size(found.memory)} at most so far; no budget was given"
    return f"{size(found.memory)} at most so far, of {size(found.budget)}"


def _bar(share: float) -> Text:
    full = round(share * BAR)
    return Text("█" * full + "·" * (BAR - full))


def strip(rates: Sequence[float | None]) -> Text:
    """A cell for each layer, higher and greener the more was in memory; a dot where nothing was asked."""
    text = Text()
    for rate in rates:
        if rate is None:
            text.append("·", style="dim")
        else:
            style = "red" if rate < LITTLE else "yellow" if rate < MUCH else "green"
            text.append(HEIGHTS[min(len(HEIGHTS) - 1, int(rate * len(HEIGHTS)))], style=style)
    return text


def line(found: Figures) -> str:
    """For a pipe or a file."""
    busy = ", ".join(f"{worker.name} {worker.busy:.0%}" for worker in found.workers)
    said = "; ".join(f"{name} {value}" for name, value in _rows(found))
    return f"[watch: {said}; busy: {busy}; hits by layer {digits(found.hits_by_layer)}]"


def digits(rates: Sequence[float | None]) -> str:
    """A character for each layer: tenths of hits, * for all, a dot where nothing was looked up."""
    return "".join("·" if rate is None else "*" if rate >= 1 else str(int(10 * rate)) for rate in rates)


def tail(text: str, width: int) -> str:
    """The last lines of a text, as a terminal of so many columns would break them."""
    lines: list[str] = []
    for whole in text.split("\n"):
        lines += [whole[start : start + width] for start in range(0, max(1, len(whole)), width)]
    return "\n".join(lines[-TEXT_LINES:])
