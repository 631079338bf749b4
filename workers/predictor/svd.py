"""Predictors without training: the up-projection's truncated singular value decomposition.

Where the FFN input is known (look-ahead 0) the score is the pre-activation itself, rounded to a
rank; applied to an earlier layer's input it leans on the residual stream changing slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.predictor.lowmap import LowMap


def decompose(up: Tensor, bias: Tensor, rank: int) -> LowMap:
    """Of an up-projection `[d_ff, d_model]` and its bias `[d_ff]`, float32. Exact at full rank.

    By the eigenvectors V of upᵀ·up, `[d_model, d_model]`: up ≈ (up·V)·Vᵀ. That is the same
    truncation at a fraction of the cost and memory of the full decomposition.
    """
    wide = up.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    kept = vectors[:, -min(rank, up.shape[1]) :]
    return LowMap(kept.T.float().contiguous(), (wide @ kept).float(), bias.float())
