"""A feed-forward layer by its units: activations of some, and the sum of what they contribute.

Units lie in the lines of slots' memory; `up` and `down` rows say which elements of a line they are. A unit's
rows are those of its neurons, one behind the other, but for the down rows of a unit of several neurons: those
are the outputs'.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import I32, Rows
from workers.kernels.functions import ACTIVATIONS, activation
from workers.kernels.launch import CHUNK, rows_ahead, stages, take, use_threads
from workers.kernels.rows import FAST, four, loops
from workers.kernels.sums import add_rows, columns

_OUTPUTS = 64  # of a sum over units that a thread takes at a time


@njit(nogil=True)
def _find(slots: Any, stride: Any, first: Any, count: Any, step: Any, start: Any, stop: Any, at: Any) -> None:
    """Elements where the rows start … stop of some units begin, counted through the units, `count` each."""
    unit = start // count
    within = start - unit * count
    for i in range(stop - start):
        at[i] = slots[unit] * stride + first + within * step
        within += 1
        if within == count:
            within = 0
            unit += 1


@njit(fastmath=FAST, nogil=True)
def _products(
    codec: Any, memory: Any, at: Any, count: Any, known: Any, ahead: Any, given: Any, out: Any
) -> None:
    """Products with the first `count` of the rows at `at`; those up to `known` may be asked for."""
    for i in range(0, count, 4):  # as in dense.py
        i0, i1, i2, i3 = four(i, count - 1)
        n0, n1, n2, n3 = four(i + ahead, known - 1)
        rows, following = (at[i0], at[i1], at[i2], at[i3]), (at[n0], at[n1], at[n2], at[n3])
        t0, t1, t2, t3 = codec.dots(memory, rows, following, given)
        out[i0] = t0
        out[i1] = t1
        out[i2] = t2
        out[i3] = t3


@njit(nogil=True)
def _add_bias(bias: Any, ids: Any, count: Any, start: Any, which: Any, out: Any) -> None:
    """out[k] += the bias of row start + which[k], counted through the units `ids`, `count` each."""
    for k in range(which.shape[0]):
        i = start + which[k]
        out[k] += bias[ids[i // count] * count + i % count]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _activate(
    codec: Any,
    memory: Any,
    place: Any,
    ids: Any,
    slots: Any,
    h: Any,
    bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
    threads: Any,
) -> None:
    stride, first, count, step, ahead = place
    given = codec.prepare(h)
    rows = slots.shape[0] * count
    progress = stages(1)
    for _ in prange(threads):
        at, each = np.empty(CHUNK + ahead, np.int64), np.arange(CHUNK)
        while True:
            start = take(progress, 0) * CHUNK
            if start >= rows:
                break
            stop = min(start + CHUNK, rows)
            known = min(stop + ahead, rows) - start
            _find(slots, stride, first, count, step, start, start + known, at)
            found = out[start:stop]
            _products(codec, memory, at, stop - start, known, ahead, given, found)
            if bias.shape[0] > 0:
                _add_bias(bias, ids, count, start, each[: stop - start], found)
            for i in range(stop - start):
                found[i] = activation(found[i], function, threshold)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _activate_gated(
    gate_codec: Any,
    up_codec: Any,
    gates: Any,
    ups: Any,
    gate_place: Any,
    up_place: Any,
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
    gate_stride, gate_first, count, gate_step, gate_ahead = gate_place
    up_stride, up_first, _, up_step, up_ahead = up_place
    gate_h, up_h = gate_codec.prepare(h), up_codec.prepare(h)
    rows = slots.shape[0] * count
    progress = stages(1)
    for _ in prange(threads):
        at, each = np.empty(CHUNK + gate_ahead, np.int64), np.arange(CHUNK)
        products, live = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int64)
        while True:
            start = take(progress, 0) * CHUNK
            if start >= rows:
                break
            stop = min(start + CHUNK, rows)
            known = min(stop + gate_ahead, rows) - start
            _find(slots, gate_stride, gate_first, count, gate_step, start, start + known, at)
            found = out[start:stop]
            _products(gate_codec, gates, at, stop - start, known, gate_ahead, gate_h, found)
            if gate_bias.shape[0] > 0:
                _add_bias(gate_bias, ids, count, start, each[: stop - start], found)
            for i in range(stop - start):
                found[i] = activation(found[i], function, threshold)
            _find(slots, up_stride, up_first, count, up_step, start, stop, at)
            alive = 0
            for i in range(stop - start):
                if found[i] != 0:  # the other neurons' up rows are not read
                    live[alive], at[alive] = i, at[i]
                    alive += 1
            _products(up_codec, ups, at, alive, alive, up_ahead, up_h, products)
            if up_bias.shape[0] > 0:
                _add_bias(up_bias, ids, count, start, live[:alive], products)
            for k in range(alive):
                t = products[k]
                found[live[k]] *= max(t, np.float32(0)) if rectified else t


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
    codec: Any, memory: Any, place: Any, ids: Any, slots: Any, a: Any, y: Any, chunk: Any, threads: Any
) -> Any:
    stride, first, _, _, _ = place
    places = _ascending(ids, a)
    at = slots[places] * stride + first
    add_rows(codec, memory, at, y.shape[0], a[places], y, chunk, threads)
    return places.shape[0]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _combine(
    codec: Any, memory: Any, place: Any, order: Any, slots: Any, width: Any, x: Any, y: Any, threads: Any
) -> None:
    """y[j] += Σ row j of unit u · part u of x, unit after unit in this order."""
    stride, first, _, step, ahead = place
    given = codec.prepare(x)
    rows, units = y.shape[0], order.shape[0]
    progress = stages(1)
    for _ in prange(threads):
        while True:
            start = take(progress, 0) * _OUTPUTS
            if start >= rows:
                break
            stop = min(start + _OUTPUTS, rows)
            for number in range(units):
                unit = order[number]
                part = codec.part(given, unit * width, (unit + 1) * width)
                own, after = slots[unit] * stride + first, slots[order[min(number + 1, units - 1)]]
                for i in range(start, stop, 4):
                    i0, i1, i2, i3 = four(i, stop - 1)
                    later, base = i + ahead, own
                    if later >= stop:  # the first ones of the next unit
                        later, base = min(start + later - stop, stop - 1), after * stride + first
                    n0, n1, n2, n3 = four(later, stop - 1)
                    at = own + i0 * step, own + i1 * step, own + i2 * step, own + i3 * step
                    following = base + n0 * step, base + n1 * step, base + n2 * step, base + n3 * step
                    t = codec.dots(memory, at, following, part)
                    for j in range(min(4, stop - i)):
                        y[i + j] += t[j]


@njit(cache=True, nogil=True)
def _gather(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> None:
    for i in range(at.shape[0]):
        codec.widen_row(memory, at[i], column, width, out[i])


def _place(rows: Rows) -> tuple[int, int, int, int, int]:
    """Where a role's rows lie in flat memory: what `_find` takes, and `rows_ahead`."""
    ahead = rows_ahead(rows.elements * rows.memory.itemsize)
    return rows.memory.shape[1], rows.start, rows.count, rows.elements, ahead


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
    memory = up.memory.reshape(-1)
    result = np.empty(slots.shape[0] * up.count, np.float32) if out is None else out
    launched = use_threads(threads, slots.shape[0] * up.count * up.elements * memory.itemsize)
    least, number = np.float32(threshold), ACTIVATIONS[function]
    _activate(loops(up.codec), memory, _place(up), ids, slots, h, bias, result, number, least, launched)
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
    result = np.empty(slots.shape[0] * up.count, np.float32) if out is None else out
    size = gate.elements * gate.memory.itemsize + up.elements * up.memory.itemsize
    launched = use_threads(threads, slots.shape[0] * up.count * size)
    _activate_gated(
        loops(gate.codec),
        loops(up.codec),
        gate.memory.reshape(-1),
        up.memory.reshape(-1),
        _place(gate),
        _place(up),
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
    """y [d_model] += what the units in the lines `slots` add, by ascending ids; both [n], a [n · width].

    The sum of each element is made strictly in that order, so that it may be continued by another call.
    Returns the number of activations that are not zero; the rows of single neurons of which they are zero are
    skipped, which changes nothing.
    """
    codec, memory, place = loops(down.codec), down.memory.reshape(-1), _place(down)
    launched = use_threads(threads, slots.shape[0] * down.count * down.elements * memory.itemsize)
    if down.count > 1:
        order = np.argsort(ids, kind="stable")
        _combine(codec, memory, place, order, slots, down.width, a, y, launched)
        return int(np.count_nonzero(a))
    chunk = columns(y.shape[0], launched)
    active: int = _accumulate(codec, memory, place, ids, slots, a, y, chunk, launched)
    return active


def gather(rows: Rows, vectors: npt.NDArray[np.integer[Any]], start: int, width: int, out: F32) -> None:
    """Widen elements [start, start + width) of the given vectors into out [n, width].

    Vectors are counted through all lines.

    Single-threaded and without the interpreter's lock: callers divide the work among threads.
    """
    assert out.shape == (vectors.shape[0], width)
    line, within = np.divmod(vectors.astype(np.int64), rows.count)
    at = line * rows.memory.shape[1] + rows.start + within * rows.elements
    _gather(loops(rows.codec), rows.memory.reshape(-1), at, start, rows.width, out)
