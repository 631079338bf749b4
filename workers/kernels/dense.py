"""Products of a whole matrix with a vector, and with each of several."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from storage.codecs import F32
from storage.layout import Rows
from workers.kernels.launch import CHUNK, FAST, rows_ahead, stages, take, tell, use_threads
from workers.kernels.rows import four, loops

NO_BIAS: F32 = np.zeros(0, np.float32)


@njit(fastmath=FAST, nogil=True)
def share_of_product(
    progress: Any,
    stage: Any,
    codec: Any,
    memory: Any,
    first: Any,
    step: Any,
    given: Any,
    bias: Any,
    out: Any,
    ahead: Any,
) -> None:
    """A thread's share of a stage: out[i] = the row at element first + i · step of `memory`, times `given`.

    `given` is prepared for the rows' codec; `ahead` as in `rows_ahead`.
    """
    biased = bias.shape[0] > 0
    last = out.shape[0] - 1
    start = take(progress, stage) * CHUNK
    while start <= last:
        then = take(progress, stage) * CHUNK  # known now, so that its rows can be asked for
        stop = min(start + CHUNK, last + 1)
        # Four rows at a time keep more of the memory under way than one.
        for i in range(start, stop, 4):
            i0, i1, i2, i3 = four(i, last)
            n0, n1, n2, n3 = four(i + ahead if i + ahead < stop else then + i + ahead - stop, last)
            rows = first + i0 * step, first + i1 * step, first + i2 * step, first + i3 * step
            following = first + n0 * step, first + n1 * step, first + n2 * step, first + n3 * step
            t0, t1, t2, t3 = codec.dots(memory, rows, following, given)
            if biased:
                t0 += bias[i0]
                t1 += bias[i1]
                t2 += bias[i2]
                t3 += bias[i3]
            out[i0] = t0
            out[i1] = t1
            out[i2] = t2
            out[i3] = t3
        tell(progress, stage)
        start = then


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _matvec(
    codec: Any, memory: Any, first: Any, step: Any, x: Any, bias: Any, out: Any, ahead: Any, threads: Any
) -> None:
    given = codec.prepare(x)
    progress = stages(1)
    for _ in prange(threads):
        share_of_product(progress, 0, codec, memory, first, step, given, bias, out, ahead)


def matvec(weights: Rows, x: F32, threads: int, bias: F32 = NO_BIAS, out: F32 | None = None) -> F32:
    """`weights @ x + bias`: a row of `weights` for each output, x [width]; returns [lines]."""
    memory = weights.memory
    result = np.empty(memory.shape[0], np.float32) if out is None else out
    size = weights.elements * memory.itemsize
    launched = use_threads(threads, memory.shape[0] * size)
    flat, step = memory.reshape(-1), memory.shape[1]
    _matvec(loops(weights.codec), flat, weights.start, step, x, bias, result, rows_ahead(size), launched)
    return result


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _matvecs(
    codec: Any, memory: Any, first: Any, step: Any, xs: Any, bias: Any, outs: Any, ahead: Any, threads: Any
) -> None:
    progress = stages(xs.shape[0])
    for _ in prange(threads):
        for n in range(xs.shape[0]):  # nobody waits: what is left of one vector is done beside the next
            given = codec.prepare(xs[n])
            share_of_product(progress, n, codec, memory, first, step, given, bias, outs[n], ahead)


def matvecs(weights: Rows, xs: F32, threads: int, bias: F32 = NO_BIAS) -> F32:
    """`matvec` of each row of xs [n, width], to the bit; returns [n, lines]. For small matrices."""
    memory = weights.memory
    outs = np.empty((xs.shape[0], memory.shape[0]), np.float32)
    size = weights.elements * memory.itemsize
    launched = use_threads(threads, outs.size * size)
    flat, step = memory.reshape(-1), memory.shape[1]
    _matvecs(loops(weights.codec), flat, weights.start, step, xs, bias, outs, rows_ahead(size), launched)
    return outs
