"""What bounds a run, in words, and the table of a token's parts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.tracing.reading import Disk, Parts, Reading
from pipeline.tracing.slices import (
    ATTENTION,
    AUDIT,
    CHOOSE,
    DECIDE,
    EMBED,
    FETCH,
    FFN,
    HAND_OVER,
    HEAD,
    PREDICT,
)

FULL = 0.7  # of the disk's ceiling while it reads: no other order of the same reads would be much quicker
LITTLE = 0.25  # of a token: where compute waits less, its work bounds the run
MOST = 2 / 3  # of the waiting: the layers named hold at least this

NAMES = {
    EMBED: "embedding",
    ATTENTION: "attention, norms, routing",
    CHOOSE: "choosing by the shadow",
    FFN: "FFN",
    AUDIT: "audit",
    HEAD: "head, sampling, drafts",
    PREDICT: "waits for the predictor",
    DECIDE: "waits for the cache's decision",
    FETCH: "waits for reads",
    HAND_OVER: "waits for messages between processes",
}


def describe(reading: Reading) -> list[str]:
    """Sentences: what bounds decode, or where there was none the prompt."""
    parts = reading.token
    if parts is None:
        assert reading.prompt is not None
        return [f"The prompt took {reading.prompt.ms:.0f} ms; no second token was written."]
    named = _bound(parts, reading.disk)
    lines = [f"{named}; {_waits(parts)}."]
    if (disk := reading.disk) is not None:
        ceiling = f", {disk.of_ceiling_while_reading:.0%} of its ceiling" if disk.ceiling else ""
        lines.append(
            f"A token reads {disk.bytes_a_token / 1e6:.3g} MB; reads are under way {disk.busy:.0%} of the "
            f"time, at {disk.rate / 1e9:.2g} GB/s{ceiling}."
        )
    else:
        lines.append("Tokens read nothing from flash.")
    return lines


def _bound(parts: Parts, disk: Disk | None) -> str:
    """What bounds decode, with its figure."""
    if parts.waited_ms < LITTLE * parts.ms:
        part, ms = max(parts.work_ms.items(), key=lambda item: item[1])
        return f"compute bounds the run: {_ms(ms)} of {_ms(parts.ms)} ms a token are {NAMES[part]}"
    what = max(parts.wait_ms, key=lambda name: parts.wait_ms[name])
    if what != FETCH or disk is None:
        share = parts.wait_ms[what] / parts.ms
        who = {
            PREDICT: "the predictor bounds the run",
            DECIDE: "the cache bounds the run",
            HAND_OVER: "messages between the processes bound the run",
            FETCH: "reads bound the run",
        }[what]
        return f"{who}: compute {NAMES[what]} {share:.0%} of the time"
    if not disk.ceiling:
        return "the disk bounds the run"
    if disk.of_ceiling_while_reading >= FULL:
        reading = f"{disk.of_ceiling_while_reading:.0%} while it reads"
        return f"disk: {disk.of_ceiling:.0%} of its ceiling, and {reading}"
    return (
        f"reads bound the run, and do not fill the disk: while it reads it brings "
        f"{disk.of_ceiling_while_reading:.0%} of its ceiling"
    )


def _ms(value: float) -> str:
    """Three digits of it: `31`, `1.42`, `1,150`."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _waits(parts: Parts) -> str:
    """How long compute waits, and in which layers most of it."""
    waited = parts.waited_ms
    if waited < 0.01 * parts.ms:
        return "compute waits for nothing"
    first, last = busiest(parts.wait_by_layer_ms)
    whole = f"compute waits {_ms(waited)} ms a token"
    if 2 * (last - first + 1) > len(parts.wait_by_layer_ms):
        return f"{whole}, spread over the layers"
    inside = sum(parts.wait_by_layer_ms[first : last + 1])
    where = f"layer {first}" if first == last else f"layers {first}–{last}"
    return f"{whole}, {_ms(inside)} of them in {where}"


def busiest(values: Sequence[float]) -> tuple[int, int]:
    """The first and last of the fewest neighbours that hold most of the values' sum."""
    goal = MOST * sum(values)
    best, start, held = (0, len(values) - 1), 0, 0.0
    for end, value in enumerate(values):
        held += value
        while start < end and held - values[start] >= goal:
            held -= values[start]
            start += 1
        if held >= goal and end - start < best[1] - best[0]:
            best = start, end
    return best


def table(reading: Reading) -> str:
    """The parts of a token and of the prompt, which sum to their time."""
    columns = [
        (name, parts)
        for name, parts in (("a token", reading.token), ("a prompt", reading.prompt))
        if parts is not None
    ]
    lines = [f"{'ms':<38}" + "".join(f"{name:>12}{'':>6}" for name, _ in columns)]
    for key, name in NAMES.items():
        values = [{**parts.work_ms, **parts.wait_ms}[key] for _, parts in columns]
        if any(values):
            lines.append(f"{name:<38}" + _row(values, [parts.ms for _, parts in columns]))
    lines.append(
        f"{'sum of the parts':<38}" + _row([p.sum_ms for _, p in columns], [p.ms for _, p in columns])
    )
    lines.append(f"{'measured from end to end':<38}" + "".join(f"{p.ms:>12.3f}{'':>6}" for _, p in columns))
    counts = ", ".join(f"{p.count} × {name[2:]}" for name, p in columns)
    return "\n".join([*lines, f"means of {counts}"])


def _row(values: Sequence[float], wholes: Sequence[float]) -> str:
    shares = (value / whole if whole else 0.0 for value, whole in zip(values, wholes, strict=True))
    return "".join(f"{value:>12.3f}{share:>6.0%}" for value, share in zip(values, shares, strict=True))
