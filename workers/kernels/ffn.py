"""A feed-forward layer by its units: activations of some, and the sum of what they contribute.

Units lie in the lines of slots' memory; `up` and `down` rows say which elements of a line they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import I32, Rows, neurons_of
from workers.kernels.functions import ACTIVATIONS, activation
from workers.kernels.launch import CHUNK, FAST, chunk_counter, next_chunk, use_threads
from workers.kernels.rows import four, loops
from workers.kernels.sums import add_rows, columns

Places = npt.NDArray[np.int64]
_ABOVE = {"none": 0, "relu": 1, "clamped": 2}  # what becomes of an up product, by its number
_OUTPUTS = 128  # of a sum over units that a thread takes at a time


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _activate(
    codec: Any,
    memory: Any,
    at: Any,
    ids: Any,
    h: Any,
    bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
    threads: Any,
) -> None:
    given = codec.prepare(h)
    biased = bias.shape[0] > 0
    last = at.shape[0] - 1
    counter = chunk_counter()
    for _ in prange(threads):
        start = next_chunk(counter) * CHUNK
        while start <= last:
            then = next_chunk(counter) * CHUNK  # known now, so that its rows can be asked for
            stop = min(start + CHUNK, last + 1)
            for i in range(start, stop, 4):  # as in dense.py
                i0, i1, i2, i3 = four(i, last)
                n0, n1, n2, n3 = four(i + 4 if i + 4 < stop else then, last)
                rows = at[i0], at[i1], at[i2], at[i3]
                following = at[n0], at[n1], at[n2], at[n3]
                t0, t1, t2, t3 = codec.dots(memory, rows, following, given)
                if biased:
                    t0 += bias[ids[i0]]
                    t1 += bias[ids[i1]]
                    t2 += bias[ids[i2]]
                    t3 += bias[ids[i3]]
                out[i0] = activation(t0, function, threshold)
                out[i1] = activation(t1, function, threshold)
                out[i2] = activation(t2, function, threshold)
                out[i3] = activation(t3, function, threshold)
            start = then


@njit(inline="always")
def _raised(product: Any, above: Any, numbers: Any) -> Any:
    """What becomes of an up product."""
    if above == 1:
        return max(product, np.float32(0))
    if above == 2:
        return min(max(product, -numbers[0]), numbers[0]) + np.float32(1)
    return product


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _activate_gated(
    gate_codec: Any,
    up_codec: Any,
    gates: Any,
    ups: Any,
    gate_at: Any,
    up_at: Any,
    ids: Any,
    h: Any,
    gate_bias: Any,
    up_bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
    above: Any,
    threads: Any,
) -> None:
    gate_h, up_h = gate_codec.prepare(h), up_codec.prepare(h)
    last = gate_at.shape[0] - 1
    counter = chunk_counter()
    for _ in prange(threads):
        activated = np.empty(CHUNK, np.float32)
        live = np.empty(CHUNK, np.int64)  # places in the launch whose activation is not zero
        start = next_chunk(counter) * CHUNK
        while start <= last:
            then = next_chunk(counter) * CHUNK  # known now, so that its rows can be asked for
            stop = min(start + CHUNK, last + 1)
            for i in range(start, stop, 4):  # as in dense.py
                i0, i1, i2, i3 = four(i, last)
                n0, n1, n2, n3 = four(i + 4 if i + 4 < stop else then, last)
                rows = gate_at[i0], gate_at[i1], gate_at[i2], gate_at[i3]
                following = gate_at[n0], gate_at[n1], gate_at[n2], gate_at[n3]
                t0, t1, t2, t3 = gate_codec.dots(gates, rows, following, gate_h)
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
                rows = up_at[i0], up_at[i1], up_at[i2], up_at[i3]
                following = up_at[live[n0]], up_at[live[n1]], up_at[live[n2]], up_at[live[n3]]
                t0, t1, t2, t3 = up_codec.dots(ups, rows, following, up_h)
                if up_bias.shape[0] > 0:
                    t0 += up_bias[ids[i0]]
                    t1 += up_bias[ids[i1]]
                    t2 += up_bias[ids[i2]]
                    t3 += up_bias[ids[i3]]
                t0, t1 = _raised(t0, above, threshold), _raised(t1, above, threshold)
                t2, t3 = _raised(t2, above, threshold), _raised(t3, above, threshold)
                out[i0] = activated[i0 - start] * t0
                out[i1] = activated[i1 - start] * t1
                out[i2] = activated[i2 - start] * t2
                out[i3] = activated[i3 - start] * t3
            start = then


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
def _accumulate(codec: Any, memory: Any, at: Any, ids: Any, a: Any, y: Any, chunk: Any, threads: Any) -> Any:
    places = _ascending(ids, a)
    add_rows(codec, memory, at[places], y.shape[0], a[places], y, chunk, threads)
    return places.shape[0]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _combine(codec: Any, memory: Any, at: Any, step: Any, width: Any, x: Any, y: Any, threads: Any) -> None:
    """y[j] += Σ row j of unit u · part u of x, unit after unit; a unit's rows are `step` elements apart."""
    given = codec.prepare(x)
    rows = y.shape[0]
    last = rows - 1
    counter = chunk_counter()
    for _ in prange(threads):
        while True:
            start = next_chunk(counter) * _OUTPUTS
            if start > last:
                break
            for unit in range(at.shape[0]):
                first, part = at[unit], codec.part(given, unit * width, (unit + 1) * width)
                for i in range(start, min(start + _OUTPUTS, rows), 4):
                    i0, i1, i2, i3 = four(i, last)
                    n0, n1, n2, n3 = four(i + 4, last)
                    places = first + i0 * step, first + i1 * step, first + i2 * step, first + i3 * step
                    later = first + n0 * step, first + n1 * step, first + n2 * step, first + n3 * step
                    t = codec.dots(memory, places, later, part)
                    for j in range(min(4, rows - i)):
                        y[i + j] += t[j]


@njit(cache=True, nogil=True)
def _gather(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> None:
    for i in range(at.shape[0]):
        codec.widen_row(memory, at[i], column, width, out[i])


def _pair(numbers: tuple[float, float]) -> tuple[np.float32, np.float32]:
    return np.float32(numbers[0]), np.float32(numbers[1])


def _places(rows: Rows, lines: I32) -> Places:
    """The elements of flat memory where the vectors of some lines begin, one line after the other."""
    first: Places = lines.astype(np.int64) * rows.memory.shape[1] + rows.start
    if rows.count == 1:
        return first
    return np.add.outer(first, np.arange(rows.count) * rows.elements).reshape(-1)


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
    """Activations [n · width] of the units `ids` [n], whose up-projection rows lie in the lines `slots` [n].

    h [d_model]; `bias` is indexed by neuron, or empty; `threshold` is fatrelu's.
    """
    at, memory = _places(up, slots), up.memory.reshape(-1)
    result = np.empty(at.shape[0], np.float32) if out is None else out
    launched = use_threads(threads, at.shape[0] * up.elements * memory.itemsize)
    least, number, neurons = _pair((threshold, 1.0)), ACTIVATIONS[function], neurons_of(ids, up.count)
    _activate(loops(up.codec), memory, at, neurons, h, bias, result, number, least, launched)
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
    """`activation(gate · h) * up_activation(up · h)` [n · width] of the units `ids`, as `activate`.

    `biases` are the gate's and the up-projection's. Of a neuron whose gate's activation is zero the up row is
    not read: the result is zero whatever finite numbers it holds.
    """
    at = _places(gate, slots)
    result = np.empty(at.shape[0], np.float32) if out is None else out
    size = gate.elements * gate.memory.itemsize + up.elements * up.memory.itemsize
    launched = use_threads(threads, at.shape[0] * size)
    _activate_gated(
        loops(gate.codec),
        loops(up.codec),
        gate.memory.reshape(-1),
        up.memory.reshape(-1),
        at,
        _places(up, slots),
        neurons_of(ids, up.count),
        h,
        *biases,
        result,
        ACTIVATIONS[ffn.activation],
        _pair(ffn.numbers),
        _ABOVE[ffn.up_activation],
        launched,
    )
    return result


def accumulate(down: Rows, ids: I32, slots: I32, a: F32, y: F32, threads: int) -> int:
    """y [d_model] += what the units in the lines `slots` add, by ascending ids; both [n], a [n · width].

    The sum of each element is made strictly in that order, so that it may be continued by another call.
    Returns the number of activations that are not zero; the rows of single neurons of which they are zero are
    skipped, which changes nothing.
    """
    memory = down.memory.reshape(-1)
    if down.count > 1:
        return _units(down, ids, slots, a, y, threads)
    launched = use_threads(threads, slots.shape[0] * down.elements * memory.itemsize)
    at, chunk = _places(down, slots), columns(y.shape[0], launched)
    active: int = _accumulate(loops(down.codec), memory, at, ids, a, y, chunk, launched)
    return active


def _units(down: Rows, ids: I32, slots: I32, a: F32, y: F32, threads: int) -> int:
    """`accumulate` of units of several neurons, whose down rows lie by output: [d_model, width]."""
    order = np.argsort(ids, kind="stable")
    first = slots[order].astype(np.int64) * down.memory.shape[1] + down.start
    x = a.reshape(ids.shape[0], -1)[order].reshape(-1)
    memory, step = down.memory.reshape(-1), down.elements
    launched = use_threads(threads, ids.shape[0] * down.count * step * memory.itemsize)
    _combine(loops(down.codec), memory, first, step, down.width, x, y, launched)
    return int(np.count_nonzero(a))


def gather(rows: Rows, vectors: npt.NDArray[np.integer[Any]], start: int, width: int, out: F32) -> None:
    """Widen elements [start, start + width) of the given vectors into out [n, width].

    Vectors are counted through all lines.

    Single-threaded and without the interpreter's lock: callers divide the work among threads.
    """
    assert out.shape == (vectors.shape[0], width)
    line, within = np.divmod(vectors.astype(np.int64), rows.count)
    at = line * rows.memory.shape[1] + rows.start + within * rows.elements
    _gather(loops(rows.codec), rows.memory.reshape(-1), at, start, rows.width, out)
