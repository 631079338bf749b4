"""Activity layer by layer: how much of the FFN a token, and a window of tokens, uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from workers.lab.offline.trace import Trace
from workers.lab.pictures import picture
from workers.lab.traces.windows import Window, windows


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """One layer's shares of the FFN."""

    layer: int
    used: float  # by one token
    windows: list[Window]  # k = 1 … longest


def activity(trace: Trace, longest: int) -> list[LayerActivity]:
    """Every layer's share per token, and its windows up to `longest` tokens."""
    found = []
    for layer in range(trace.layers):
        some = slice(layer, layer + 1)
        alone = replace(trace, active=trace.used[some], predicted=None, guessed=None)
        counted = windows(alone, longest)
        found.append(LayerActivity(layer, counted[0].union, counted))
    return found


def table(layers: Sequence[LayerActivity], mean: Sequence[Window], k: int) -> Table:
    """Per layer: used by a token, and union and new at a window of k tokens."""
    made = Table("layer", "used, %", f"union of {k}, %", f"new per token at {k}, %")
    rows = [(str(one.layer), one.windows) for one in layers] + [("mean", list(mean))]
    for name, counted in rows:
        shares = (counted[0].union, counted[k - 1].union, counted[k - 1].new)
        made.add_row(name, *(f"{100 * share:.2f}" for share in shares))
    return made


def draw(layers: Sequence[LayerActivity], mean: Sequence[Window], path: Path) -> None:
    """Activity by layer; union and new neurons by window, every layer thin and the mean thick."""
    with picture(path, 1, 3, size=(13, 4)) as [(bars, union, new)]:
        bars.bar([one.layer for one in layers], [100 * one.used for one in layers])
        bars.set_xlabel("layer")
        bars.set_ylabel("used by a token, % of the FFN")
        for axes, name, what in ((union, "union", "union of k tokens"), (new, "new", "new per token")):
            for one in layers:
                axes.plot([w.k for w in one.windows], [100 * getattr(w, name) for w in one.windows], lw=0.7)
            axes.plot([w.k for w in mean], [100 * getattr(w, name) for w in mean], lw=2.5, color="black")
            axes.set_xlabel("window k, tokens")
            axes.set_ylabel(f"{what}, % of the FFN")
            axes.grid(alpha=0.3)
