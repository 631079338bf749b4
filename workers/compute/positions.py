"""Positions: rotary angles and ALiBi biases, as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from storage.architecture import Attention
from storage.codecs import narrow, widen

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


class Positions:
    """Tables of every layer for a context, computed once. Layers with equal positions share theirs."""

    def __init__(self, layers: Sequence[Attention], context: int) -> None:
        rotaries = cache(lambda rope, head_dim: rotary(rope.base, head_dim, context))
        biases = cache(lambda heads, head_dim: alibi(heads, head_dim, context))
        nothing = np.zeros((context, 0), np.float32)
        self.rotary: list[tuple[F32, F32]] = [
            rotaries(one.rope, one.head_dim) if one.rope else (nothing, nothing) for one in layers
        ]  # cos and sin, [context, head_dim / 2] or [context, 0]
        self.bias: list[F32] = [
            biases(one.heads, one.head_dim) if one.alibi else np.zeros((0, 0), np.float32) for one in layers
        ]  # [heads, context] or [0, 0]


def _slopes(base: float, powers: range) -> F32:
    return np.float32(base) ** np.array(powers, np.float32)


def _rounded(x: F32) -> F32:
    """To bfloat16 and back."""
    return widen(narrow(x, "bfloat16"), "bfloat16")
