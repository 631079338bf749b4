"""The outputs of several experts of one token, each by itself: they are summed later, in their own order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import I32, Rows
from workers.kernels.ffn import ABOVE, pair, raised
from workers.kernels.functions import ACTIVATIONS, activation
from workers.kernels.launch import FAST, rows_ahead, stages, take, tell, use_threads, wait
from workers.kernels.rows import four, loops

_PIECE = 1 << 17  # bytes of one expert's rows that a thread takes at a time


@njit(nogil=True, fastmath=FAST)
def _share(
    progress: Any, stage: Any, codec: Any, memory: Any, at: Any, place: Any, given: Any, shift: Any, out: Any
) -> None:
    """A thread's share of a stage: out[n, i] = row i of expert n, whose rows begin at at[n], times its part
    of `given`: `width` values from value n · `shift` on.

    `place`: elements of a row, its `width`, how many rows ahead are asked for, and how many are a piece.
    """
    step, width, ahead, piece = place
    experts, rows = out.shape
    pieces = (rows + piece - 1) // piece  # of one expert
    number = take(progress, stage)
    while number < experts * pieces:
        then = take(progress, stage)  # known now, so that it can be asked for
        nearest = min(then, experts * pieces - 1)
        expert, start = number // pieces, number % pieces * piece
        stop = min(start + piece, rows)
        first, y = at[expert], out[expert]
        next_first, next_start = at[nearest // pieces], nearest % pieces * piece
        part = codec.part(given, expert * shift, expert * shift + width)
        for i in range(start, stop, 4):  # as in dense.py
            i0, i1, i2, i3 = four(i, stop - 1)
            inside = i + ahead < stop
            base = first if inside else next_first
            n0, n1, n2, n3 = four(i + ahead if inside else next_start + i + ahead - stop, rows - 1)
            here = first + i0 * step, first + i1 * step, first + i2 * step, first + i3 * step
            following = base + n0 * step, base + n1 * step, base + n2 * step, base + n3 * step
            t0, t1, t2, t3 = codec.dots(memory, here, following, part)
            y[i0] = t0
            y[i1] = t1
            y[i2] = t2
            y[i3] = t3
        tell(progress, stage)
        number = then


@njit(nogil=True, fastmath=FAST)
def _activate(
    progress: Any,
    stage: Any,
    gates: Any,
    ups: Any,
    ids: Any,
    biases: Any,
    function: Any,
    numbers: Any,
    above: Any,
) -> None:
    """A thread's share of a stage: gates[n] = activation(gates[n] + bias) · (ups[n] + bias)."""
    gate_bias, up_bias = biases
    experts, width = gates.shape
    number = take(progress, stage)
    while number < experts:
        gate, up, first = gates[number], ups[number], ids[number] * width
        for i in range(width):
            g, u = gate[i], up[i]
            if gate_bias.shape[0] > 0:
                g += gate_bias[first + i]
            if up_bias.shape[0] > 0:
                u += up_bias[first + i]
            gate[i] = activation(g, function, numbers) * raised(u, above, numbers)
        tell(progress, stage)
        number = take(progress, stage)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _outputs(
    codecs: Any,
    memories: Any,
    at: Any,
    places: Any,
    ids: Any,
    x: Any,
    biases: Any,
    activated: Any,
    gates: Any,
    ups: Any,
    out: Any,
    threads: Any,
) -> None:
    gate_codec, up_codec, down_codec = codecs
    gate_memory, up_memory, down_memory = memories
    gate_place, up_place, down_place = places
    function, numbers, above = activated  # numba takes no tuples of tuples into the threads
    gate_x, up_x = gate_codec.prepare(x), up_codec.prepare(x)
    experts, width = gates.shape
    _, _, _, gate_piece = gate_place
    _, _, _, up_piece = up_place
    progress = stages(4)
    for _ in prange(threads):
        _share(progress, 0, gate_codec, gate_memory, at[0], gate_place, gate_x, 0, gates)
        _share(progress, 1, up_codec, up_memory, at[1], up_place, up_x, 0, ups)
        wait(progress, 0, experts * ((width + gate_piece - 1) // gate_piece))
        wait(progress, 1, experts * ((width + up_piece - 1) // up_piece))
        _activate(progress, 2, gates, ups, ids, biases, function, numbers, above)
        wait(progress, 2, experts)
        a = down_codec.prepare(gates.reshape(-1))  # each thread for itself: less than another wait
        _share(progress, 3, down_codec, down_memory, at[2], down_place, a, width, out)


def outputs(
    rows: tuple[Rows, Rows, Rows],
    ids: I32,
    slots: I32,
    x: F32,
    biases: tuple[F32, F32],
    ffn: Ffn,
    threads: int,
) -> F32:
    """What the experts `ids`, in the lines `slots`, make of x [d_model], without a down bias: [n, d_model].

    Each is `down @ (activation(gate @ x) * up_activation(up @ x))`. `rows` are gate, up and down, the
    latter by output. `biases` are the gate's and the up-projection's, by neuron, or empty.
    """
    gate, up, down = rows
    count = slots.shape[0]
    gates, ups = np.empty((count, gate.count), np.float32), np.empty((count, up.count), np.float32)
    out = np.empty((count, down.count), np.float32)
    at = np.empty((3, count), np.int64)
    for row, role in enumerate(rows):
        at[row] = slots * np.int64(role.memory.shape[1]) + role.start
    size = sum(role.count * role.elements * role.memory.itemsize for role in rows)
    _outputs(
        (loops(gate.codec), loops(up.codec), loops(down.codec)),
        (gate.memory.reshape(-1), up.memory.reshape(-1), down.memory.reshape(-1)),
        at,
        (_place(gate), _place(up), _place(down)),
        ids,
        x,
        biases,
        (ACTIVATIONS[ffn.activation], pair(ffn.numbers), ABOVE[ffn.up_activation]),
        gates,
        ups,
        out,
        use_threads(threads, count * size),
    )
    return out


def _place(rows: Rows) -> tuple[int, int, int, int]:
    """As `_share` wants it."""
    size = rows.elements * rows.memory.itemsize
    return rows.elements, rows.width, rows_ahead(size), max(4, _PIECE // size // 4 * 4)


@njit(fastmath=FAST, cache=True, nogil=True)
def _add_weighted(outputs: Any, order: Any, weights: Any, y: Any) -> None:
    for n in order:
        row, weight = outputs[n], weights[n]
        for j in range(y.shape[0]):
            y[j] += weight * row[j]


def add_weighted(outputs: F32, ids: I32, weights: F32, y: F32) -> None:
    """y [d_model] += weights[n] · outputs[n], by ascending ids; outputs [n, d_model]. One thread."""
    _add_weighted(outputs, np.argsort(ids, kind="stable"), weights, y)
