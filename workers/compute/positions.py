"""Positions: rotary angles and ALiBi biases, as transformers computes them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

F32 = npt.NDArray[np.float32]


def rotary(base: float, head_dim: int, context: int) -> tuple[F32, F32]:
    """cos and sin, [context, head_dim / 2] each."""
    inverse = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(context, dtype=torch.float32)[:, None] * inverse
    return angles.cos().numpy(), angles.sin().numpy()


def alibi(heads: int, head_dim: int, context: int) -> F32:
    """[heads, context], added to the scaled scores.

    Falcon rounds slopes, positions and their products to bfloat16 and scales the bias with the
    scores. The bias depends on the key's position alone: the query's part cancels in the softmax.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = _slopes(2 ** -(2 ** -(math.log2(power) - 3)), range(1, 1 + power))
    if power != heads:
        rest = min(power, heads - power)
        base = 2 ** -(2 ** -(math.log2(2 * power) - 3))
        slopes = torch.cat([slopes, _slopes(base, range(1, 1 + 2 * rest, 2))])
    bias = slopes[:, None].bfloat16() * torch.arange(context)[None, :]
    return (bias.float() / math.sqrt(head_dim)).numpy()


def _slopes(base: float, powers: range) -> torch.Tensor:
    return torch.pow(torch.tensor(base, dtype=torch.float32), torch.tensor(powers, dtype=torch.int32))
