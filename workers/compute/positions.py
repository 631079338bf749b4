"""Positions: rotary angles and ALiBi biases, as transformers computes them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from storage.floats import narrow, widen

F32 = npt.NDArray[np.float32]


def rotary(base: float, head_dim: int, context: int) -> tuple[F32, F32]:
    """cos and sin, [context, head_dim / 2] each."""
    inverse = 1 / np.float32(base) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    angles = np.arange(context, dtype=np.float32)[:, None] * inverse
    return np.cos(angles), np.sin(angles)


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
        slopes = np.concatenate((slopes, _slopes(base, range(1, 1 + 2 * rest, 2))))
    bias = _rounded(_rounded(slopes)[:, None] * _rounded(np.arange(context, dtype=np.float32)))
    return bias / np.float32(math.sqrt(head_dim))


def _slopes(base: float, powers: range) -> F32:
    return np.float32(base) ** np.array(powers, np.float32)


def _rounded(x: F32) -> F32:
    """To bfloat16 and back."""
    return widen(narrow(x, "bfloat16"), "bfloat16")
