"""Names of counters that two processes share, above all those of each layer: `layer.N.NAME`.

Workers put them into `Stats`; the page of `pipeline/serving/page.html` makes the same names for itself.
"""

from __future__ import annotations

_PREFIX = "layer."
KEPT = "kept"  # compute's: units of decode that it did not have to ask for
PROMPT_LAYERS = "prompt_layers"  # compute's: layers that prompts have passed
# Compute's, and no totals: the layer at hand, and 1 while compute waits for a part of it.
NOW_LAYER, NOW_WAITS = "now_layer", "now_waits"
STEPS, DRAFTED, ACCEPTED = "steps", "drafted", "accepted"  # compute's: steps of decode, and its drafts


def of_layer(layer: int, name: str) -> str:
    """The counter `name` of one layer."""
    return f"{_PREFIX}{layer}.{name}"


def layer_and_name(counter: str) -> tuple[int, str] | None:
    """Inverse of `of_layer`; None for a counter that belongs to no layer."""
    layer, dot, name = counter.removeprefix(_PREFIX).partition(".")
    if not counter.startswith(_PREFIX) or not dot or not layer.isdecimal():
        return None
    return int(layer), name
