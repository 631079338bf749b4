"""Pictures as PNG, with matplotlib, which is imported where one is drawn; no window, no state of pyplot's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

DPI = 110


@contextlib.contextmanager
def picture(
    path: Path,
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float],
    layout: Literal["constrained", "tight"] = "constrained",
    sharex: bool = False,
    sharey: bool = False,
) -> Iterator[Any]:
    """Panels to draw on, an array `[rows, columns]` of axes; written to `path` when the block ends.

    `size` is in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    figure.savefig(path, dpi=DPI)
