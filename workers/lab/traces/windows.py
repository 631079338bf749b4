"""Exact accounting of the paper's window: the union of the last k tokens, and what a token adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.lab.offline.trace import Trace


@dataclass(frozen=True, slots=True)
class Window:
    """Means over tokens and layers, as shares of the FFN."""

    k: int  # tokens
    union: float  # used by any of the last k tokens, this one included
    new: float  # used by this token and by none of the k before it


def windows(trace: Trace, longest: int) -> list[Window]:
    """k = 1 … `longest`, over the tokens that have `longest` others before them."""
    unions = np.zeros(longest + 2)
    new = np.zeros(longest + 2)
    for layer in range(trace.layers):
        masks = trace.masks(trace.used, layer)
        last = np.full(trace.d_ff, -longest - 1)
        for token in range(trace.tokens):
            used = np.flatnonzero(masks[token])
            if token >= longest:
                gaps = np.minimum(token - last[used], longest + 1)
                new += np.bincount(gaps, minlength=longest + 2)
            last[used] = token
            if token >= longest:
                ages = np.minimum(token - last, longest)
                unions[1 : longest + 1] += np.cumsum(np.bincount(ages, minlength=longest + 1))[:longest]
    counted = (trace.tokens - longest) * trace.layers * trace.d_ff
    return [
        Window(k, float(unions[k] / counted), float(new[k + 1 :].sum() / counted))
        for k in range(1, longest + 1)
    ]
