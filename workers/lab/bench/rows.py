"""A measured configuration: medians and spreads of its runs, in the paper's columns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.ring.counters import KEPT
from storage.layout import Unit
from workers.lab.bench.children import Ran

NAIVE = "naive"  # the row of the baseline that keeps nothing
TECHNIQUES = ("hybrid", "predictor", "window", "bundling", "overlap")
ROUTED = ("router set", "slots", "hits first", "guesses")  # of a mixture of experts


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. Times are milliseconds a token, bytes are bytes a token unless named otherwise.

    I/O is the time with reads in flight, and overlaps with compute where there is look-ahead; the columns
    add up to the total only where nothing overlaps.
    """

    name: str
    techniques: tuple[str, ...] = ()
    error: str = ""  # why it could not be measured; everything below is 0 then
    failed: str = ""  # why a run failed after good ones, of which the row is
    budget_bytes: int | None = None
    dram_bytes: int = 0  # most that all processes held
    dram_by: str = ""  # cgroup, or proportional set size
    limited: bool = False
    cold: bool = False
    bytes_per_token: float = 0.0
    reads_per_token: float = 0.0
    bus_bytes: float = 0.0  # to a device's memory
    device_bytes: int = 0  # most that compute held of a GPU's memory
    touched_bytes: float = 0.0  # FFN rows that the kernels need a token
    io_ms: float = 0.0
    management_ms: float = 0.0  # of slots, and of what goes over to a device
    prediction_ms: float = 0.0
    compute_ms: float = 0.0
    waiting_ms: float = 0.0  # of compute, for parts
    other_ms: float = 0.0  # neither computing nor waiting
    total_ms: float = 0.0  # median over all tokens of all runs
    p10_ms: float = 0.0
    p90_ms: float = 0.0
    run_ms: tuple[float, ...] = ()  # each run's median
    hit_rate: float = 0.0
    best_hit_rate: float | None = None  # of Belady's policy; None: not replayed
    prefill_seconds: float = 0.0
    prefill_bytes: float = 0.0  # read by it
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """What flash delivered while reads were in flight."""
        return 1e3 * self.bytes_per_token / self.io_ms if self.io_ms else 0.0

    @property
    def request_bytes(self) -> float:
        return self.bytes_per_token / self.reads_per_token if self.reads_per_token else 0.0

    def to_json(self) -> dict[str, Any]:
        derived = {"bytes_per_second": self.bytes_per_second, "request_bytes": self.request_bytes}
        return {**asdict(self), **derived}


def of_rings(
    name: str,
    techniques: tuple[str, ...],
    runs: Sequence[Ran],
    unit: Unit,
    settings: Mapping[str, str],
) -> Row:
    """Runs of the main job, at least one, with the same configuration."""
    results = [run.result for run in runs]
    timed = _Timed.of([result["token_seconds"] for result in results])

    def per_token(*names: tuple[str, str]) -> float:
        """Median over runs of counters' growth, per decoded token."""
        found: float = statistics.median(
            sum(result["counters"][worker].get(counter, 0.0) for worker, counter in names)
            / max(1, result["generated_tokens"] - 1)
            for result in results
        )
        return found

    phases = ("attention", "shadow", "ffn", "head")
    compute = 1e3 * per_token(*(("compute", f"{phase}_seconds") for phase in phases))
    transfer = 1e3 * per_token(("compute", "decode_transfer_seconds"))  # within the FFN's
    compute = max(0.0, compute - transfer)
    waiting = 1e3 * per_token(("compute", "waiting_seconds"))
    # Misses are what was read: also guesses that no set wanted.
    wasted = per_token(("cache", "decode_wasted"))
    neurons = per_token(("cache", "decode_hits"), ("compute", KEPT), ("cache", "decode_misses")) - wasted
    active = per_token(("compute", "active"))
    deciding = unit.row_bytes(unit.rows[0].role)
    return Row(
        name=name,
        techniques=techniques,
        budget_bytes=results[0]["memory"]["budget_bytes"],
        bytes_per_token=per_token(("prefetcher", "decode_bytes")),
        reads_per_token=per_token(("prefetcher", "decode_reads")),
        # A neuron's first row, which decides, is needed in any case, the others where it is active.
        touched_bytes=neurons * deciding + active * (unit.bytes - deciding),
        io_ms=1e3 * per_token(("prefetcher", "decode_busy_seconds")),
        bus_bytes=per_token(("compute", "decode_bus_bytes")),
        device_bytes=int(max(result["counters"]["compute"].get("device_bytes", 0) for result in results)),
        management_ms=1e3 * per_token(("cache", "decode_seconds")) + transfer,
        prediction_ms=1e3 * per_token(("predictor", "decode_seconds")),
        compute_ms=compute,
        waiting_ms=waiting,
        other_ms=max(0.0, timed.mean - compute - transfer - waiting),
        hit_rate=statistics.median(result["cache"]["hit_rate"] for result in results),
        prefill_seconds=statistics.median(result["seconds"]["prefill"] for result in results),
        prefill_bytes=statistics.median(result["flash"]["prefill_bytes"] for result in results),
        settings=settings,
        **_common(runs, timed, [result["memory"]["peak_bytes"] for result in results]),
    )


def of_naive(runs: Sequence[Ran], *, budget: int | None) -> Row:
    """Runs of `workers.lab.bench.naive`, at least one."""
    results = [run.result for run in runs]
    timed = _Timed.of([result["token_seconds"] for result in results])

    def median(name: str) -> float:
        return float(statistics.median(result[name] for result in results))

    waiting, transfer = (1e3 * median(f"{name}_seconds_per_token") for name in ("waiting", "transfer"))
    return Row(
        name=NAIVE,
        budget_bytes=budget,
        bytes_per_token=median("bytes_per_token"),
        reads_per_token=median("reads_per_token"),
        io_ms=1e3 * median("busy_seconds_per_token"),
        bus_bytes=median("bus_bytes_per_token"),
        device_bytes=int(median("device_bytes")),
        management_ms=transfer,
        compute_ms=max(0.0, timed.mean - waiting - transfer),
        waiting_ms=waiting,
        **_common(runs, timed, [result["memory_bytes"] for result in results]),
    )


def of_peer(name: str, runs: Sequence[Ran], *, budget: int | None) -> Row:
    """Runs of another package: times, and what the kernel says of memory and reads."""
    results = [run.result for run in runs]
    timed = _Timed.of([result["token_seconds"] for result in results])
    return Row(
        name=f"{name} {results[0].get('version', '')}".strip(),
        budget_bytes=budget,
        bytes_per_token=statistics.median(result["bytes_per_token"] for result in results),
        prefill_seconds=statistics.median(result.get("prompt_seconds", 0.0) for result in results),
        **_common(runs, timed, [result["memory_bytes"] for result in results], "resident set size"),
    )


def _common(
    runs: Sequence[Ran], timed: _Timed, held: Sequence[int], held_by: str = "proportional set size"
) -> dict[str, Any]:
    """What every row has. `held`: bytes of each run as it counted them, for want of a cgroup."""
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "dram_bytes": max(peaks or held),
        "dram_by": "cgroup" if peaks else held_by,
        "limited": all(run.limited for run in runs),
        "cold": all(run.cold for run in runs),
        "total_ms": timed.median,
        "p10_ms": timed.p10,
        "p90_ms": timed.p90,
        "run_ms": timed.runs,
    }


@dataclass(frozen=True, slots=True)
class _Timed:
    """Tokens' times over all runs, milliseconds."""

    median: float
    mean: float
    p10: float
    p90: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]]) -> _Timed:
        tokens = sorted(1e3 * seconds for run in runs for seconds in run)
        if not tokens:
            raise ValueError("no token was timed")
        last = len(tokens) - 1
        return cls(
            median=statistics.median(tokens),
            mean=statistics.fmean(tokens),
            p10=tokens[round(0.1 * last)],
            p90=tokens[round(0.9 * last)],
            runs=tuple(1e3 * statistics.median(run) for run in runs if run),
        )
