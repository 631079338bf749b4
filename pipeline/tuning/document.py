"""The file that a search leaves: a configuration of what is quicker, with what was measured as comments."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from pipeline.tuning.knobs import Value
from pipeline.tuning.search import Compared, Outcome, Tried


def document(outcome: Outcome, about: Sequence[str]) -> str:
    """TOML of `outcome.changes`; `about`: lines on what was measured where."""
    lines = [
        f"# Written by `run.py tune` on {time.strftime('%Y-%m-%d %H:%M')}.",
        *(f"# {line}" for line in about),
    ]
    lines += ["#", f"# {verdict(outcome)}", ""]
    by_section = sorted((tuple(key.split(".")), value) for key, value in outcome.changes.items())
    for section, group in groupby(by_section, key=lambda one: one[0][0]):
        lines.append(f"[{section}]")
        lines += [
            f"{key[1]} = {_toml(value)}  # was {_toml(outcome.beginning['.'.join(key)])}"
            for key, value in group
        ]
        lines.append("")
    lines.append("# What was tried, ms a token, medians of runs in turn:")
    lines += [f"# {line_of(one)}" for one in outcome.tried] or ["# nothing"]
    return "\n".join(lines) + "\n"


def verdict(outcome: Outcome) -> str:
    """What came of it, in one sentence."""
    tail = "" if outcome.in_time else " The time ended before every knob was turned."
    if outcome.changes:
        gain = 1 - statistics.median(outcome.last.after) / statistics.median(outcome.last.before)
        return f"{gain:.1%} quicker than the beginning: {_beside(outcome.last)} in new runs in turn.{tail}"
    if outcome.last.after:
        return (
            f"Nothing is quicker than the beginning: what seemed so was not in new runs in turn, "
            f"{_beside(outcome.last)}.{tail}"
        )
    return f"Nothing is quicker than the beginning.{tail}"


def line_of(one: Tried) -> str:
    """One value, in words."""
    name = f"{one.key} = {_toml(one.value)}"
    if one.refused:
        return f"{name}: refused, {one.refused}"
    return f"{name}: {_beside(one.compared)}{', taken' if one.taken else ''}"


def _beside(compared: Compared) -> str:
    after, before = (1e3 * statistics.median(one) for one in (compared.after, compared.before))
    return f"{after:,.2f} beside {before:,.2f}"


def _toml(value: Value) -> str:
    return json.dumps(value)


def to_json(outcome: Outcome) -> dict[str, Any]:
    """For programs."""
    return {**asdict(outcome), "changes": outcome.changes, "verdict": verdict(outcome)}
