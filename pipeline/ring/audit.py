"""What an audited generation found, from compute's counters (`workers/compute/audit.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

AUDIT_EVERY = 4  # tokens, with --audit: one layer of every fourth token is checked


def of(grown: Callable[[str, str], float], layers: int) -> dict[str, Any]:
    """Shares per layer and over all; `grown(worker, name)` is a counter's growth."""
    names = (
        "tokens",
        "active",
        "missed",
        "wrong",
        "inactive",
        "magnitude",
        "magnitude_missed",
        "output",
        "error",
    )
    sums = [
        {name: grown("compute", f"layer.{layer}.audit_{name}") for name in names} for layer in range(layers)
    ]
    whole = {name: sum(one[name] for one in sums) for name in names}
    return {
        **_shares(whole),
        "seconds": grown("compute", "audit_seconds"),
        "layers": [{"layer": layer, **_shares(one)} for layer, one in enumerate(sums) if one["tokens"]],
    }


def _shares(sums: dict[str, float]) -> dict[str, float]:
    """`output_error` is the norm of the FFN output's error over the norm of the output."""
    return {
        "tokens": int(sums["tokens"]),
        "active": _ratio(sums["active"], sums["active"] + sums["inactive"]),
        "false_negatives": _ratio(sums["missed"], sums["active"]),
        "false_positives": _ratio(sums["wrong"], sums["inactive"]),
        "weighted_recall": 1.0 - _ratio(sums["magnitude_missed"], sums["magnitude"]),
        "output_error": _ratio(sums["error"], sums["output"]) ** 0.5,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def describe_audit(found: dict[str, Any]) -> str:
    """One line."""
    return (
        f"[audit of {found['tokens']} layers: {found['false_negatives']:.1%} of the active neurons missed, "
        f"{found['false_positives']:.1%} of the others computed for nothing, recall by magnitude "
        f"{found['weighted_recall']:.2%}, error of the FFN's output {found['output_error']:.2%}]"
    )
