"""Positions: rotary angles and ALiBi biases, as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from storage.architecture import (
    Attention,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Rope,
    Scaling,
    YarnScaling,
)
from storage.codecs import narrow, widen

F32 = npt.NDArray[np.float32]


def rotary(rope: Rope, head_dim: int, context: int) -> tuple[F32, F32]:
    """cos and sin, [context, dims / 2] each, of the first `dims` values of a head that are rotated."""
    magnitude = rope.scaling.magnitude if isinstance(rope.scaling, YarnScaling | LongropeScaling) else 1.0
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies(rope, head_dim, context)
    return np.cos(angles) * np.float32(magnitude), np.sin(angles) * np.float32(magnitude)


def frequencies(rope: Rope, head_dim: int, context: int) -> F32:
    """Radians by which each angle turns from one position to the next, [dims / 2]."""
    dims = head_dim if rope.dims is None else rope.dims
    powers: F32 = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    inverse: F32 = np.reciprocal(np.float32(rope.base) ** powers, dtype=np.float32)
    return inverse if rope.scaling is None else _scaled(rope.scaling, rope.base, inverse, context)


def _scaled(scaling: Scaling, base: float, inverse: F32, context: int) -> F32:
    """Each angle's turn from one position to the next, [dims / 2], scaled for a context."""
    match scaling:
        case LinearScaling():
            return inverse / np.float32(scaling.factor)
        case Llama3Scaling():
            return _llama3(scaling, inverse)
        case YarnScaling():
            return _yarn(scaling, base, inverse)
        case LongropeScaling():
            factors = scaling.long if context > scaling.original else scaling.short
            each: F32 = np.array(factors, np.float32)
            return inverse / each


def _llama3(scaling: Llama3Scaling, inverse: F32) -> F32:
    """Slow turns are stretched, fast ones are not, and those between go over smoothly."""
    turns = scaling.original * inverse / (2 * math.pi)  # in the original context
    smooth: F32 = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1).astype(np.float32)
    mixed: F32 = (1 - smooth) * inverse / np.float32(scaling.factor) + smooth * inverse
    return mixed


def _yarn(scaling: YarnScaling, base: float, inverse: F32) -> F32:
    """As `_llama3`, with a ramp that is linear in the number of the angle."""
    pairs = inverse.size

    def place(turns: float) -> float:
        """The angle that turns so often in the original context."""
        return pairs * math.log(scaling.original / (turns * 2 * math.pi)) / math.log(base)

    low, high = place(scaling.fast), place(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (np.arange(pairs, dtype=np.float32) - low) / ((high - low) or 0.001)
    stretched: F32 = np.clip(ramp, 0, 1).astype(np.float32)
    mixed: F32 = inverse / np.float32(scaling.factor) * stretched + inverse * (1 - stretched)
    return mixed


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
        self.context = context
        rotaries = cache(lambda rope, head_dim: rotary(rope, head_dim, context))
        biases = cache(lambda heads, head_dim: alibi(heads, head_dim, context))
        nothing = np.zeros((context, 0), np.float32)
        self.rotary: list[tuple[F32, F32]] = [
            rotaries(one.rope, one.head_dim) if one.rope else (nothing, nothing) for one in layers
        ]  # cos and sin, [context, dims / 2] or [context, 0]
        self.bias: list[F32] = [
            biases(one.heads, one.head_dim) if one.alibi else np.zeros((0, 0), np.float32) for one in layers
        ]  # [heads, context] or [0, 0]


def _slopes(base: float, powers: range) -> F32:
    return np.float32(base) ** np.array(powers, np.float32)


def _rounded(x: F32) -> F32:
    """To bfloat16 and back."""
    return widen(narrow(x, "bfloat16"), "bfloat16")
