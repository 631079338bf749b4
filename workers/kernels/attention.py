"""Attention of one token: rotate it, keep its keys and values, attend to all that are kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from storage.codecs import F32, Carrier, Codec
from workers.kernels.codecs import scalars
from workers.kernels.launch import FAST, use_threads
from workers.kernels.rows import add_four, add_one, dots, four

_NO_SINKS = np.zeros(0, np.float32)


@njit(fastmath=FAST, cache=True, nogil=True)
def _rotate(vectors: Any, cos: Any, sin: Any) -> None:
    half = cos.shape[0]
    for i in range(vectors.shape[0]):
        for j in range(half):
            low, high = vectors[i, j], vectors[i, half + j]
            vectors[i, j] = low * cos[j] - high * sin[j]
            vectors[i, half + j] = high * cos[j] + low * sin[j]


@njit(cache=True, nogil=True)
def put(codec: Any, vectors: Any, position: Any, cache: Any) -> None:
    """Round `vectors` [heads, head_dim] into row `position` of `cache` [heads, context, head_dim]."""
    for head in range(vectors.shape[0]):
        row = cache[head, position]
        for j in range(row.shape[0]):
            row[j] = codec.narrow(vectors[head, j])


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _attend(
    codec: Any,
    queries: Any,
    keys: Any,
    values: Any,
    first: Any,
    length: Any,
    scale: Any,
    softcap: Any,
    bias: Any,
    sinks: Any,
    scores: Any,
    out: Any,
) -> None:
    heads, width = queries.shape
    group = heads // keys.shape[0]
    biased = bias.shape[0] > 0
    last = length - 1
    for head in prange(heads):
        shared = head // group
        query, score = queries[head], scores[head]
        key, value = keys[shared], values[shared]
        for t in range(first, length, 4):  # as in dense.py
            t0, t1, t2, t3 = four(t, last)
            n0, n1, n2, n3 = four(t + 4, last)
            rows, following = (key[t0], key[t1], key[t2], key[t3]), (key[n0], key[n1], key[n2], key[n3])
            s0, s1, s2, s3 = dots(codec, rows, following, query)
            score[t0] = s0
            score[t1] = s1
            score[t2] = s2
            score[t3] = s3
        if softcap > np.float32(0):
            for t in range(first, length):
                score[t] = np.float32(math.tanh(score[t] * scale / softcap))
        sunk = sinks.shape[0] > 0
        highest = sinks[head] if sunk else np.float32(-np.inf)
        factor = softcap if softcap > np.float32(0) else scale
        for t in range(first, length):
            score[t] *= factor
            if biased:
                score[t] += bias[head, t]
            highest = max(highest, score[t])
        total = np.float32(math.exp(sinks[head] - highest)) if sunk else np.float32(0)
        for t in range(first, length):
            score[t] = np.float32(math.exp(score[t] - highest))
            total += score[t]
        result = out[head * width : (head + 1) * width]
        for j in range(width):
            result[j] = np.float32(0)
        whole = first + (length - first) // 4 * 4
        for t in range(first, whole, 4):
            add_four(codec, result, score[t : t + 4], value[t], value[t + 1], value[t + 2], value[t + 3])
        for t in range(whole, length):
            add_one(codec, result, score[t], value[t])
        for j in range(width):
            result[j] /= total


@njit(cache=True, nogil=True)
def _keep_and_attend(
    codec: Any,
    projected: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    position: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    bias: Any,
    sinks: Any,
    scores: Any,
    out: Any,
) -> None:
    heads, width = scores.shape[0], keys.shape[2]
    vectors = projected.reshape(-1, width)
    shared = heads + keys.shape[0]
    _rotate(vectors[:shared], cos, sin)
    put(codec, vectors[heads:shared], position, keys)
    put(codec, vectors[shared:], position, values)
    length = position + 1
    first = max(0, length - window)
    _attend(codec, vectors[:heads], keys, values, first, length, scale, softcap, bias, sinks, scores, out)


def attend(
    projected: F32,
    cos: F32,
    sin: F32,
    keys: Carrier,
    values: Carrier,
    position: int,
    scale: float,
    bias: F32,
    scores: F32,
    codec: Codec,
    threads: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: F32 = _NO_SINKS,
) -> F32:
    """Attention of the token at `position`; returns [heads · head_dim].

    projected [(heads + 2 · kv_heads) · head_dim]: its queries, keys and values, of which the first two
    are rotated in place by cos and sin, one for each pair of a head's first values: [head_dim / 2], or fewer,
    or none. Keys and values go into the caches, [kv_heads, context, head_dim] of `codec`'s carrier, before
    they are attended to; the token sees the last `window` of them, or all. Products are multiplied by
    `scale`, and then s becomes softcap · tanh(s / softcap) where there is one; bias [heads, context] is
    added to them, or has no rows; scores [heads, context] is scratch. Sinks [heads], where there are any, are
    one more score of each head, whose share is lost.
    """
    heads, width = scores.shape[0], keys.shape[2]
    out = np.empty(heads * width, np.float32)
    seen = position + 1 if window is None else window
    use_threads(threads, heads * min(position + 1, seen) * width * 2 * keys.itemsize)
    numbers, factor, cap = scalars(codec), np.float32(scale), np.float32(softcap or 0)
    _keep_and_attend(
        numbers, projected, cos, sin, keys, values, position, seen, factor, cap, bias, sinks, scores, out
    )
    return out
