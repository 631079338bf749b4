"""The results as PNG, with matplotlib."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from storage.errors import UsageError
from workers.lab.bench.disk import Throughput
from workers.lab.bench.rows import Row
from workers.lab.pictures import picture

PARTS = (("io_ms", "I/O"), ("management_ms", "memory management"), ("compute_ms", "compute"))


def check() -> None:
    """Raises UsageError where matplotlib is missing."""
    try:
        import matplotlib as found
    except ImportError as error:
        raise UsageError("plots need matplotlib, or bench with --no-plots") from error
    del found


def ablation(path: Path, rows: Sequence[Row], title: str) -> None:
    """Bars of the total, with I/O, management and compute beside it."""
    measured = [row for row in rows if not row.error]
    with _axes(path, title) as axes:
        places = range(len(measured))
        width = 0.8 / (len(PARTS) + 1)
        for number, (field, label) in enumerate((("total_ms", "total"), *PARTS)):
            values = [getattr(row, field) for row in measured]
            axes.bar([place + (number - 1.5) * width for place in places], values, width, label=label)
        axes.set_xticks(list(places), [row.name for row in measured], rotation=20, ha="right")
        axes.set_yscale("log")
        axes.set_ylabel("ms a token")
        axes.legend()


def curve(path: Path, rows: Sequence[Row], title: str) -> None:
    """Memory against latency."""
    measured = [row for row in rows if not row.error]
    with _axes(path, title) as axes:
        budgets = [(row.budget_bytes or 0) / 1e9 for row in measured]
        axes.plot(budgets, [row.total_ms for row in measured], "o-", label="total")
        axes.plot(budgets, [row.io_ms for row in measured], "s--", label="I/O")
        axes.set_xlabel("memory budget, GB")
        axes.set_ylabel("ms a token")
        axes.set_ylim(bottom=0)
        axes.legend()


def disk(path: Path, tries: Sequence[Throughput], title: str) -> None:
    """Throughput against request size, a line for each number of reads in flight; best of the readers."""
    with _axes(path, title) as axes:
        for total in sorted({one.readers * one.depth for one in tries}):
            of_total = [one for one in tries if one.readers * one.depth == total]
            sizes = sorted({one.request_bytes for one in of_total})
            rates = [max(o.bytes_per_second for o in of_total if o.request_bytes == s) / 1e9 for s in sizes]
            axes.plot([size / 1024 for size in sizes], rates, "o-", label=f"{total} in flight")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("request, KiB")
        axes.set_ylabel("GB/s")
        axes.legend(fontsize="small")


@contextlib.contextmanager
def _axes(path: Path, title: str) -> Iterator[Any]:
    with picture(path, size=(8, 5)) as [[axes]]:
        axes.set_title(title)
        axes.grid(alpha=0.3)
        yield axes
