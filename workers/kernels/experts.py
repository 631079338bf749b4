"""The outputs of several experts, each by itself: they are summed later, in an order of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from storage.codecs import F32
from storage.layout import I32, Rows
from workers.kernels.launch import FAST, stages, take, use_threads
from workers.kernels.rows import four, loops

_OUTPUTS = 128  # of one expert that a thread takes at a time


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _outputs(codec: Any, memory: Any, at: Any, step: Any, width: Any, x: Any, out: Any, threads: Any) -> None:
    given = codec.prepare(x)
    experts, rows = out.shape
    pieces = (rows + _OUTPUTS - 1) // _OUTPUTS  # of one expert
    last = rows - 1
    progress = stages(1)
    for _ in prange(threads):
        while True:
            piece = take(progress, 0)
            expert = piece // pieces
            if expert >= experts:
                break
            start = piece % pieces * _OUTPUTS
            first, y = at[expert], out[expert]
            part = codec.part(given, expert * width, (expert + 1) * width)
            for i in range(start, min(start + _OUTPUTS, rows), 4):  # as in dense.py
                i0, i1, i2, i3 = four(i, last)
                n0, n1, n2, n3 = four(i + 4, last)
                places = first + i0 * step, first + i1 * step, first + i2 * step, first + i3 * step
                later = first + n0 * step, first + n1 * step, first + n2 * step, first + n3 * step
                t0, t1, t2, t3 = codec.dots(memory, places, later, part)
                y[i0] = t0
                y[i1] = t1
                y[i2] = t2
                y[i3] = t3


def outputs(down: Rows, slots: I32, a: F32, threads: int) -> F32:
    """`down @ a` of each expert in the lines `slots` [n]: [n, d_model]. Rows lie by output; a [n · width]."""
    memory = down.memory.reshape(-1)
    out = np.empty((slots.shape[0], down.count), np.float32)
    first = slots.astype(np.int64) * down.memory.shape[1] + down.start
    launched = use_threads(threads, out.size * down.elements * memory.itemsize)
    _outputs(loops(down.codec), memory, first, down.elements, down.width, a, out, launched)
    return out
