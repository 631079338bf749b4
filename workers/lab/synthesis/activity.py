"""What a sequence of active sets says: how many, how many are new, how many a window holds.

A set of sets is a boolean tensor `[tokens, d_ff]`. Fractions are of d_ff, averaged over tokens.
"""

from __future__ import annotations

from torch import Tensor

WARM_UP = 16  # tokens at the start that are not counted: their windows are not full


def recent(active: Tensor, window: int) -> Tensor:
    """Which neurons were active in the `window` tokens before each token."""
    union = active.new_zeros(active.shape)
    for lag in range(1, window + 1):
        union[lag:] |= active[:-lag]
    return union


def new_per_token(active: Tensor, window: int, skip: int = WARM_UP) -> float:
    """Share of the FFN that a token needs and the `window` tokens before it did not.

    The paper's s_agg(k+1) − s_agg(k) (arXiv 2312.11514, section 3.1).
    """
    return float((active & ~recent(active, window))[skip:].float().mean())


def union_size(active: Tensor, window: int, skip: int = WARM_UP) -> float:
    """Share of the FFN active in any of `window` consecutive tokens: the paper's s_agg(k)."""
    return float((active | recent(active, window - 1))[skip:].float().mean())
