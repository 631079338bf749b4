"""What replays found: tables for people, plain data for programs, one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from workers.lab.offline.replay import Outcome
from workers.lab.offline.trace import Trace
from workers.lab.pictures import picture
from workers.lab.traces.windows import Window


@dataclass(frozen=True, slots=True)
class Result:
    """One policy at one capacity."""

    policy: str
    capacity: float  # slots, as a share of the FFN
    outcome: Outcome


def policy_table(results: Sequence[Result], trace: Trace) -> Table:
    """Hit rate and kilobytes read per token, a policy a row and a capacity a column."""
    capacities = sorted({result.capacity for result in results})
    table = Table("hit rate / KB a token", *(f"{capacity:.0%} of the FFN" for capacity in capacities))
    for policy in dict.fromkeys(result.policy for result in results):
        row = {result.capacity: result.outcome for result in results if result.policy == policy}
        cells = (row[capacity] for capacity in capacities)
        table.add_row(policy, *(f"{o.hit_rate:.2%} / {_bytes(o, trace) / 1e3:,.0f}" for o in cells))
    return table


def window_table(windows: Sequence[Window]) -> Table:
    table = Table("window k", "union, of the FFN", "new per token, of the FFN")
    for window in windows:
        table.add_row(str(window.k), f"{window.union:.2%}", f"{window.new:.3%}")
    return table


def to_json(results: Sequence[Result], windows: Sequence[Window], trace: Trace) -> dict[str, Any]:
    return {
        "trace": {"tokens": trace.tokens, "layers": trace.layers, "d_ff": trace.d_ff, **trace.meta},
        "windows": [asdict(window) for window in windows],
        "policies": [
            {
                "policy": result.policy,
                "capacity": result.capacity,
                "hit_rate": result.outcome.hit_rate,
                "bytes_per_token": _bytes(result.outcome, trace),
                **asdict(result.outcome),
            }
            for result in results
        ],
    }


def _bytes(outcome: Outcome, trace: Trace) -> float:
    return outcome.reads * trace.stride / outcome.tokens


def draw(results: Sequence[Result], windows: Sequence[Window], path: Path) -> None:
    """Hit rate by capacity, and union and new neurons by window."""
    with picture(path, 1, 2, size=(11, 4.5)) as [(rates, unions)]:
        for policy in dict.fromkeys(result.policy for result in results):
            some = [result for result in results if result.policy == policy]
            style = {"color": "black", "ls": "--"} if policy == "Belady" else {}
            rates.plot(
                [100 * result.capacity for result in some],
                [100 * result.outcome.hit_rate for result in some],
                marker="o",
                ms=3,
                label=policy,
                **style,
            )
        rates.set_xlabel("slots, % of the FFN")
        rates.set_ylabel("hit rate, %")
        rates.legend(fontsize=8)
        k = [window.k for window in windows]
        unions.plot(k, [100 * window.union for window in windows], marker="o", label="union of k tokens")
        unions.plot(k, [100 * window.new for window in windows], marker="s", label="new per token")
        unions.set_yscale("log")
        unions.set_xlabel("window k, tokens")
        unions.set_ylabel("% of the FFN")
        unions.legend(fontsize=8)
        for axes in (rates, unions):
            axes.grid(alpha=0.3)
