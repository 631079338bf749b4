"""The results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workers.lab.bench.disk import Throughput
from workers.lab.bench.prefill import Prefill
from workers.lab.bench.roofline import Roofline
from workers.lab.bench.rows import NAIVE, Row

# arXiv 2312.11514, tables 2 and 3: OPT-6.7B in 16 bits, half of it in memory. Its first two I/O times are
# computed, not measured.
PAPER = """| paper, OPT-6.7B | DRAM GB | flash→DRAM GB/token | GB/s | I/O ms |
|---|---|---|---|---|
| naive | 0 | 13.4 | 6.10 | 2196 |
| hybrid | 6.7 | 6.7 | 6.10 | 1090 |
| + predictor | 4.8 | 0.9 | 1.25 | 738 |
| + window | 6.5 | 0.2 | 1.25 | 164 |
| + bundling | 6.5 | 0.2 | 2.25 | 87 |"""


# Its table 3, ms a token: OPT-6.7B, half of it in memory.
PAPER_DEVICES = """| paper, OPT-6.7B | I/O ms | memory management ms | compute ms | total ms |
|---|---|---|---|---|
| naive, CPU (M1 Max) | 2196 | 0 | 986 | 3182 |
| all techniques | 105 | 58 | 506 | 669 |
| naive, Metal (M1) | 2196 | 0 | 193 | 2389 |
| all techniques | 92 | 35 | 438 | 565 |
| naive, CUDA (RTX 4090) | 2196 | 0 | 22 | 2218 |
| all techniques | 30 | 34 | 20 | 84 |"""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def ablation(rows: Sequence[Row], techniques: Sequence[str]) -> str:
    """The paper's columns, the hit rate, and the spread of the total."""
    bus = any(row.bus_bytes for row in rows)
    header = [
        "", *techniques, "DRAM GB", *(["device GB", "over the bus GB/token"] if bus else []),
        "flash→DRAM GB/token", "hit rate", "GB/s", "I/O ms", "memory management ms", "prediction ms",
        "compute ms", "waiting ms", "total ms, median", "p10–p90", "medians of runs",
    ]  # fmt: skip
    return table(header, [_ablation_line(row, techniques, len(header), bus) for row in rows])


def _ablation_line(row: Row, techniques: Sequence[str], columns: int, bus: bool) -> list[str]:
    marks = ["✓" if technique in row.techniques else "–" for technique in techniques]
    if row.error:
        return [row.name, *marks, f"not measured: {row.error}", *[""] * (columns - len(marks) - 2)]
    return [
        row.name,
        *marks,
        f"{row.dram_bytes / 1e9:.2f}",
        *([f"{row.device_bytes / 1e9:.2f}", f"{row.bus_bytes / 1e9:.4g}"] if bus else []),
        f"{row.bytes_per_token / 1e9:.4g}",
        f"{row.hit_rate:.1%}" if row.techniques else "",
        f"{row.bytes_per_second / 1e9:.2f}" if row.io_ms else "",
        _ms(row.io_ms),
        _ms(row.management_ms),
        _ms(row.prediction_ms),
        _ms(row.compute_ms),
        _ms(row.waiting_ms),
        f"**{_ms(row.total_ms)}**",
        f"{_ms(row.p10_ms)}–{_ms(row.p90_ms)}",
        ", ".join(_ms(one) for one in row.run_ms),
    ]


def speedups(rows: Sequence[Row], peers: Sequence[Row], roofs: Sequence[Roofline] = ()) -> str:
    """How many times faster than the naive row and each peer every ring is, and how far from its roof."""
    rings = [row for row in rows if not row.error and row.name != NAIVE]
    if not rings:
        return "No ring could be measured."
    others = [row for row in (*rows, *peers) if not row.error and (row.name == NAIVE or row in peers)]
    ratios = {roof.row: f"{roof.ratio:.2f}" for roof in roofs}
    lines = [
        [
            row.name,
            f"{row.bytes_per_token / 1e6:.0f}",
            _ms(row.total_ms),
            *(f"{other.total_ms / row.total_ms:.1f} ×" for other in others),
            ratios.get(row.name, ""),
        ]
        for row in rings
    ]
    return table(["", "MB a token", "ms", *(f"than {row.name}" for row in others), "÷ roof"], lines)


def curve(rows: Sequence[Row]) -> str:
    """The first row's is the least budget that the planner accepts."""
    replayed = any(row.best_hit_rate is not None for row in rows)
    header = [
        "budget", "DRAM GB", "GB/token", "hit rate", *(["Belady's"] if replayed else []), "I/O ms",
        "prediction ms", "compute ms", "waiting ms", "other ms", "total ms", "p10–p90",
    ]  # fmt: skip
    return table(header, [_curve_line(row, replayed, len(header)) for row in rows])


def _curve_line(row: Row, replayed: bool, columns: int) -> list[str]:
    if row.error:
        return [row.name, f"not measured: {row.error}", *[""] * (columns - 2)]
    return [
        row.name,
        f"{row.dram_bytes / 1e9:.2f}",
        f"{row.bytes_per_token / 1e9:.4g}",
        f"{row.hit_rate:.1%}",
        *(["" if row.best_hit_rate is None else f"{row.best_hit_rate:.1%}"] if replayed else []),
        _ms(row.io_ms),
        _ms(row.prediction_ms),
        _ms(row.compute_ms),
        _ms(row.waiting_ms),
        _ms(row.other_ms),
        _ms(row.total_ms),
        f"{_ms(row.p10_ms)}–{_ms(row.p90_ms)}",
    ]


def prefill(prefills: Sequence[Prefill]) -> str:
    header = [
        "row", "tokens", "seconds", "one sequential read, s", "GFLOP", "GFLOP/s in the model's dtype",
        "in float32", "÷ bound", "÷ bound in float32",
    ]  # fmt: skip
    lines = [
        [
            one.row,
            str(one.tokens),
            f"{one.seconds:.2f}",
            f"{one.read_seconds:.2f}",
            f"{one.flop / 1e9:.0f}",
            f"{one.rate / 1e9:.0f} ({one.dtype})",
            f"{one.rate_float32 / 1e9:.0f}",
            f"**{one.ratio:.2f}**",
            f"{one.ratio_float32:.2f}",
        ]
        for one in prefills
    ]
    return table(header, lines)


def disk(tries: Sequence[Throughput]) -> str:
    """GB/s, a line for each request size and number of readers, a column for each depth."""
    depths = sorted({one.depth for one in tries})
    rates = {(one.request_bytes, one.readers, one.depth): one for one in tries}
    lines = []
    for request, readers in sorted({(one.request_bytes, one.readers) for one in tries}):
        found = [rates.get((request, readers, depth)) for depth in depths]
        lines.append(
            [
                f"{request / 1024:g}",
                str(readers),
                *("" if one is None else f"{one.bytes_per_second / 1e9:.2f}" for one in found),
                f"{min(one.cpu_us_per_read for one in found if one):.1f}",
            ]
        )
    header = ["KiB", "readers", *(f"depth {depth}" for depth in depths), "least CPU µs a read"]
    return table(header, lines)


def beside_fio(tries: Sequence[Throughput]) -> str:
    """Medians of the rounds."""
    lines = []
    for readers, depth in dict.fromkeys((one.readers, one.depth) for one in tries):
        rates, cpus = {}, {}
        for program in ("prefetcher", "fio"):
            own = [one for one in tries if (one.readers, one.depth, one.program) == (readers, depth, program)]
            rates[program] = statistics.median(one.bytes_per_second for one in own)
            cpus[program] = statistics.median(one.cpu_us_per_read for one in own)
        lines.append(
            [
                f"{readers} × {depth}",
                *(f"{rate / 1e9:.2f}" for rate in rates.values()),
                f"**{rates['prefetcher'] / rates['fio']:.2f}**",
                *(f"{cpu:.1f}" for cpu in cpus.values()),
            ]
        )
    header = ["readers × depth", "prefetcher GB/s", "fio GB/s", "÷ fio", "prefetcher CPU µs a read", "fio's"]
    return table(header, lines)


def roofline(roofs: Sequence[Roofline]) -> str:
    bus = any(roof.bus for roof in roofs)
    header = [
        "row", "KiB a read", "disk GB/s idle", "with kernels", "memory GB/s", "flash GB", "flash ms",
        "memory GB", "memory ms", *(["bus GB/s", "bus GB", "bus ms"] if bus else []), "bound", "achieved ms",
        "÷ roof", "of each run", "÷ roof, idle disk",
    ]  # fmt: skip
    lines = [
        [
            roof.row,
            f"{roof.request_bytes / 1024:g}",
            f"{roof.disk_idle / 1e9:.2f}",
            f"{roof.disk_loaded / 1e9:.2f}",
            f"{roof.memory / 1e9:.1f}",
            f"{roof.flash_bytes / 1e9:.4g}",
            _ms(roof.flash_ms),
            f"{roof.memory_bytes / 1e9:.4g}",
            _ms(roof.memory_ms),
            *([f"{roof.bus / 1e9:.1f}", f"{roof.bus_bytes / 1e9:.4g}", _ms(roof.bus_ms)] if bus else []),
            roof.bound,
            _ms(roof.total_ms),
            f"**{roof.ratio:.2f}**",
            ", ".join(f"{ratio:.2f}" for ratio in roof.ratios),
            f"{roof.ratio_idle:.2f}",
        ]
        for roof in roofs
    ]
    return table(header, lines)


def document(results: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """The whole report; `parts` are its sections by title."""
    conditions = results["conditions"]
    synthetic = " (SYNTHETIC weights)" if results["synthetic"] else ""
    lines = [
        f"# {results['model']}{synthetic}",
        "",
        f"`{results['command']}`",
        "",
        f"{conditions['cpu']}, {conditions['cores']} cores, {conditions['memory_bytes'] / 2**30:.0f} GiB, "
        f"{conditions['system']}, {conditions['file_system']}; {conditions['time']}. "
        f"{results['tokens']} tokens decoded after a prompt of {results['prompt_tokens']}, "
        f"{results['repeats']} runs a row, budget {results['budget']}. "
        "I/O is the time with reads in flight: with look-ahead it overlaps with compute.",
        "",
        *(f"- {caveat}" for caveat in results["caveats"]),
    ]
    for title, text in parts.items():
        lines += ["", f"## {title}", "", text]
    return "\n".join(lines) + "\n"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
