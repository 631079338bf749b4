"""Scores of a low-rank map, and which of them pass, in one call on one thread.

A predictor answers every layer of every token from a core whose caches the other processes have filled: its
products take 40 µs, and as four calls with arrays between them they took 180.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from storage.codecs import F32, Carrier, Codec
from workers.kernels.launch import FAST
from workers.kernels.rows import four, loops


@njit(fastmath=FAST, cache=True, nogil=True)
def _score(codec: Any, down: Any, up: Any, x: Any, scale: Any, bias: Any, y: Any) -> None:
    """y = bias + Σ i of (down[i] · scale x) up[i], summed in the order of i."""
    rank, step, width = down.shape[0], down.shape[1], up.shape[1]
    given = codec.prepare(x * scale)
    inner = np.empty(rank, np.float32)
    flat = down.reshape(-1)
    last = rank - 1
    for i in range(0, rank, 4):
        i0, i1, i2, i3 = four(i, last)
        n0, n1, n2, n3 = four(i + 4, last)
        rows = i0 * step, i1 * step, i2 * step, i3 * step
        following = n0 * step, n1 * step, n2 * step, n3 * step
        inner[i0], inner[i1], inner[i2], inner[i3] = codec.dots(flat, rows, following, given)
    y[:] = bias
    flat = up.reshape(-1)
    whole = rank // 4 * 4
    for i in range(0, whole, 4):
        at = i * width, (i + 1) * width, (i + 2) * width, (i + 3) * width
        n0, n1, n2, n3 = four(i + 4, last)
        following = n0 * width, n1 * width, n2 * width, n3 * width
        codec.add_four(y, inner[i : i + 4], flat, at, following, 0, width)
    for i in range(whole, rank):
        codec.add_one(y, inner[i], flat, i * width, 0, width)


@njit(cache=True, nogil=True)
def _passing(y: Any, least: Any, most: Any, ids: Any) -> Any:
    count = 0
    for i in range(y.shape[0]):
        if least < y[i] <= most:
            ids[count] = i
            count += 1
    return count


def score(codec: Codec, down: Carrier, up: Carrier, x: F32, scale: np.float32, bias: F32, out: F32) -> None:
    """out = bias + upᵀ (down (scale · x)); down [rank, d_model], up [rank, d_ff], of floats."""
    _score(loops(codec), down, up, x, scale, bias, out)


def passing(y: F32, least: float, most: float, ids: Any) -> int:
    """Write the places i where least < y[i] <= most, ascending, to `ids` from its front; returns how many."""
    count: int = _passing(y, np.float32(least), np.float32(most), ids)
    return count
