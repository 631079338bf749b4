"""A feed-forward layer by its neurons: activations of some, and the sum of what they contribute.

Neurons lie in the lines of slots' memory; `up` and `down` rows say which elements of a line they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import Rows
from workers.kernels.codecs import scalars
from workers.kernels.functions import ACTIVATIONS, activation
from workers.kernels.launch import CHUNK, chunk_counter, next_chunk, use_threads
from workers.kernels.rows import FAST, dots, four
from workers.kernels.sums import add_lines, columns

I32 = npt.NDArray[np.int32]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _activate(
    codec: Any,
    memory: Any,
    first: Any,
    ids: Any,
    slots: Any,
    h: Any,
    bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
    threads: Any,
) -> None:
    biased = bias.shape[0] > 0
    end = first + h.shape[0]
    last = slots.shape[0] - 1
    counter = chunk_counter()
    for _ in prange(threads):
        while True:
            start = next_chunk(counter) * CHUNK
            if start > last:
                break
            for i in range(start, min(start + CHUNK, last + 1), 4):  # as in dense.py
                i0, i1, i2, i3 = four(i, last)
                n0, n1, n2, n3 = four(i + 4, last)
                rows = (
                    memory[slots[i0], first:end],
                    memory[slots[i1], first:end],
                    memory[slots[i2], first:end],
                    memory[slots[i3], first:end],
                )
                following = (
                    memory[slots[n0], first:end],
                    memory[slots[n1], first:end],
                    memory[slots[n2], first:end],
                    memory[slots[n3], first:end],
                )
                t0, t1, t2, t3 = dots(codec, rows, following, h)
                if biased:
                    t0 += bias[ids[i0]]
                    t1 += bias[ids[i1]]
                    t2 += bias[ids[i2]]
                    t3 += bias[ids[i3]]
                out[i0] = activation(t0, function, threshold)
                out[i1] = activation(t1, function, threshold)
                out[i2] = activation(t2, function, threshold)
                out[i3] = activation(t3, function, threshold)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _activate_gated(
    gate_codec: Any,
    up_codec: Any,
    gates: Any,
    ups: Any,
    first_gate: Any,
    first_up: Any,
    ids: Any,
    slots: Any,
    h: Any,
    gate_bias: Any,
    up_bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
    rectified: Any,
    threads: Any,
) -> None:
    last_gate, last_up = first_gate + h.shape[0], first_up + h.shape[0]
    last = slots.shape[0] - 1
    counter = chunk_counter()
    for _ in prange(threads):
        activated = np.empty(CHUNK, np.float32)
        live = np.empty(CHUNK, np.int64)  # places in the launch whose activation is not zero
        while True:
            start = next_chunk(counter) * CHUNK
            if start > last:
                break
            stop = min(start + CHUNK, last + 1)
            for i in range(start, stop, 4):  # as in dense.py
                i0, i1, i2, i3 = four(i, last)
                n0, n1, n2, n3 = four(i + 4, last)
                rows = (
                    gates[slots[i0], first_gate:last_gate],
                    gates[slots[i1], first_gate:last_gate],
                    gates[slots[i2], first_gate:last_gate],
                    gates[slots[i3], first_gate:last_gate],
                )
                following = (
                    gates[slots[n0], first_gate:last_gate],
                    gates[slots[n1], first_gate:last_gate],
                    gates[slots[n2], first_gate:last_gate],
                    gates[slots[n3], first_gate:last_gate],
                )
                t0, t1, t2, t3 = dots(gate_codec, rows, following, h)
                if gate_bias.shape[0] > 0:
                    t0 += gate_bias[ids[i0]]
                    t1 += gate_bias[ids[i1]]
                    t2 += gate_bias[ids[i2]]
                    t3 += gate_bias[ids[i3]]
                activated[i0 - start] = activation(t0, function, threshold)
                activated[i1 - start] = activation(t1, function, threshold)
                activated[i2 - start] = activation(t2, function, threshold)
                activated[i3 - start] = activation(t3, function, threshold)
            count = 0
            for i in range(start, stop):
                out[i] = 0
                if activated[i - start] != 0:
                    live[count] = i
                    count += 1
            for k in range(0, count, 4):  # the other neurons' up rows are not read
                k0, k1, k2, k3 = four(k, count - 1)
                n0, n1, n2, n3 = four(k + 4, count - 1)
                i0, i1, i2, i3 = live[k0], live[k1], live[k2], live[k3]
                rows = (
                    ups[slots[i0], first_up:last_up],
                    ups[slots[i1], first_up:last_up],
                    ups[slots[i2], first_up:last_up],
                    ups[slots[i3], first_up:last_up],
                )
                following = (
                    ups[slots[live[n0]], first_up:last_up],
                    ups[slots[live[n1]], first_up:last_up],
                    ups[slots[live[n2]], first_up:last_up],
                    ups[slots[live[n3]], first_up:last_up],
                )
                t0, t1, t2, t3 = dots(up_codec, rows, following, h)
                if up_bias.shape[0] > 0:
                    t0 += up_bias[ids[i0]]
                    t1 += up_bias[ids[i1]]
                    t2 += up_bias[ids[i2]]
                    t3 += up_bias[ids[i3]]
                if rectified:
                    zero = np.float32(0)
                    t0, t1, t2, t3 = max(t0, zero), max(t1, zero), max(t2, zero), max(t3, zero)
                out[i0] = activated[i0 - start] * t0
                out[i1] = activated[i1 - start] * t1
                out[i2] = activated[i2 - start] * t2
                out[i3] = activated[i3 - start] * t3


@njit(cache=True, nogil=True)
def _ascending(ids: Any, a: Any) -> Any:
    """Places of the activations that are not zero, by ascending id."""
    places = np.empty(ids.shape[0], np.int64)
    count = 0
    last = -1
    ordered = True
    for i in range(ids.shape[0]):
        if a[i] != 0:
            places[count] = i
            count += 1
            ordered = ordered and ids[i] > last
            last = max(last, ids[i])
    places = places[:count]
    if ordered:
        return places
    place_of = np.full(last + 1, -1, np.int64)
    for place in places:
        place_of[ids[place]] = place
    count = 0
    for place in place_of:
        if place >= 0:
            places[count] = place
            count += 1
    return places


@njit(cache=True, nogil=True)
def _accumulate(
    codec: Any, memory: Any, first: Any, ids: Any, slots: Any, a: Any, y: Any, chunk: Any, threads: Any
) -> Any:
    places = _ascending(ids, a)
    add_lines(codec, memory, slots[places], first, a[places], y, chunk, threads)
    return places.shape[0]


@njit(cache=True, nogil=True)
def _gather(codec: Any, memory: Any, lines: Any, first: Any, out: Any) -> None:
    for i in range(lines.shape[0]):
        row = memory[lines[i], first : first + out.shape[1]]
        target = out[i]
        for j in range(target.shape[0]):
            target[j] = codec.widen(row[j])


def activate(
    up: Rows,
    ids: I32,
    slots: I32,
    h: F32,
    bias: F32,
    function: str,
    threads: int,
    out: F32 | None = None,
    threshold: float = 0.0,
) -> F32:
    """Activations [n] of the neurons `ids` [n], whose up-projection rows lie in the lines `slots` [n].

    h [width]; `bias` is indexed by id, or empty; `threshold` is fatrelu's.
    """
    memory = up.memory
    result = np.empty(slots.shape[0], np.float32) if out is None else out
    launched = use_threads(threads, slots.shape[0] * up.width * memory.itemsize)
    least = np.float32(threshold)
    numbers, number = scalars(up.codec), ACTIVATIONS[function]
    _activate(numbers, memory, up.start, ids, slots, h, bias, result, number, least, launched)
    return result


def activate_gated(
    gate: Rows,
    up: Rows,
    ids: I32,
    slots: I32,
    h: F32,
    biases: tuple[F32, F32],
    ffn: Ffn,
    threads: int,
    out: F32 | None = None,
) -> F32:
    """`activation(gate · h) * up_activation(up · h)` [n] of the neurons `ids`, as `activate`.

    `biases` are the gate's and the up-projection's. Where the activation is zero, as ReLU's mostly is, the
    up row is not read: the result is zero whatever finite numbers it holds.
    """
    result = np.empty(slots.shape[0], np.float32) if out is None else out
    size = gate.width * gate.memory.itemsize + up.width * up.memory.itemsize
    launched = use_threads(threads, slots.shape[0] * size)
    _activate_gated(
        scalars(gate.codec),
        scalars(up.codec),
        gate.memory,
        up.memory,
        gate.start,
        up.start,
        ids,
        slots,
        h,
        *biases,
        result,
        ACTIVATIONS[ffn.activation],
        np.float32(ffn.threshold),
        ffn.up_activation == "relu",
        launched,
    )
    return result


def accumulate(down: Rows, ids: I32, slots: I32, a: F32, y: F32, threads: int) -> int:
    """y [width] += Σ a[i] · down-projection column in line slots[i], by ascending ids[i]; all [n].

    Each column is summed strictly in that order, so that a sum may be continued by another call.
    Zero activations are skipped: for ReLU they change nothing. Returns the number of the others.
    """
    memory = down.memory
    launched = use_threads(threads, slots.shape[0] * down.width * memory.itemsize)
    chunk = columns(y.shape[0], launched)
    active: int = _accumulate(scalars(down.codec), memory, down.start, ids, slots, a, y, chunk, launched)
    return active


def gather(rows: Rows, lines: I32, start: int, width: int, out: F32) -> None:
    """Widen elements [start, start + width) of the rows in the given lines into out [n, width].

    Single-threaded and without the interpreter's lock: callers divide the work among threads.
    """
    assert out.shape == (lines.shape[0], width)
    _gather(scalars(rows.codec), rows.memory, lines, rows.start + start, out)
