"""A feed-forward layer by its units: activations of some, and the sum of what they contribute.

Units lie in the lines of slots' memory; `up` and `down` rows say which elements of a line they are. A unit's
rows are those of its neurons, one behind the other, but for the down rows of a unit of several neurons: those
are the outputs'.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import I32, Rows
from workers.kernels.functions import ACTIVATIONS, activation
from workers.kernels.launch import CHUNK, FAST, rows_ahead, stages, take, tell, use_threads
from workers.kernels.rows import four, loops
from workers.kernels.sums import add_rows, columns

ABOVE = {"none": 0, "relu": 1, "clamped": 2}  # what becomes of an up product, by its number
_OUTPUTS = 64  # of a sum over units that a thread takes at a time


@njit(nogil=True)
def _find(slots: Any, place: Any, start: Any, stop: Any, at: Any) -> None:
    """Elements where the rows start … stop of some units begin, counted through the units."""
    stride, first, count, step, _ = place
    unit = start // count
    within = start - unit * count
    for i in range(stop - start):
        at[i] = slots[unit] * stride + first + within * step
        within += 1
        if within == count:
            within = 0
            unit += 1


@njit(nogil=True)
def _find_two(slots: Any, place: Any, rows: Any, start: Any, then: Any, at: Any) -> Any:
    """Those of a chunk, and behind them of as many rows of the chunk `then` as are asked for ahead.

    Returns how many there are.
    """
    _, _, _, _, ahead = place
    own = min(CHUNK, rows - start)
    more = max(0, min(ahead, rows - then))
    _find(slots, place, start, start + own, at)
    _find(slots, place, then, then + more, at[own:])
    return own + more


@njit(inline="always")
def _neuron(ids: Any, count: Any, i: Any) -> Any:
    """Which neuron row i is, counted through the units `ids`, `count` each."""
    return ids[i // count] * count + i % count


# In both kernels below products go straight into the activation function, four by four: if they were kept
# first and activated in a loop of its own, that would be vectorized, and its terms associated differently.


@njit(fastmath=FAST, nogil=True)
def share_of_activations(
    progress: Any,
    stage: Any,
    codec: Any,
    memory: Any,
    place: Any,
    ids: Any,
    slots: Any,
    given: Any,
    bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
) -> None:
    """A thread's share of a stage: activations of the units' neurons; `given` is prepared for their rows."""
    _, _, count, _, ahead = place
    biased = bias.shape[0] > 0
    rows = slots.shape[0] * count
    at = np.empty(CHUNK + ahead, np.int64)
    start = take(progress, stage) * CHUNK
    while start < rows:
        then = take(progress, stage) * CHUNK  # known now, so that its rows can be asked for
        stop = min(start + CHUNK, rows)
        known = _find_two(slots, place, rows, start, then, at)
        for i in range(start, stop, 4):  # as in dense.py
            i0, i1, i2, i3 = four(i, stop - 1)
            n0, n1, n2, n3 = four(i - start + ahead, known - 1)
            here = at[i0 - start], at[i1 - start], at[i2 - start], at[i3 - start]
            following = at[n0], at[n1], at[n2], at[n3]
            t0, t1, t2, t3 = codec.dots(memory, here, following, given)
            if biased:
                t0 += bias[_neuron(ids, count, i0)]
                t1 += bias[_neuron(ids, count, i1)]
                t2 += bias[_neuron(ids, count, i2)]
                t3 += bias[_neuron(ids, count, i3)]
            out[i0] = activation(t0, function, threshold)
            out[i1] = activation(t1, function, threshold)
            out[i2] = activation(t2, function, threshold)
            out[i3] = activation(t3, function, threshold)
        tell(progress, stage)
        start = then


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
    given = codec.prepare(h)
    progress = stages(1)
    for _ in prange(threads):
        share_of_activations(
            progress, 0, codec, memory, place, ids, slots, given, bias, out, function, threshold
        )


@njit(inline="always")
def raised(product: Any, above: Any, numbers: Any) -> Any:
    """What becomes of an up product."""
    if above == 1:
        return max(product, np.float32(0))
    if above == 2:
        return min(max(product, -numbers[0]), numbers[0]) + np.float32(1)
    return product


@njit(fastmath=FAST, nogil=True)
def share_of_gated(
    progress: Any,
    stage: Any,
    gate_codec: Any,
    up_codec: Any,
    gates: Any,
    ups: Any,
    gate_place: Any,
    up_place: Any,
    ids: Any,
    slots: Any,
    gate_h: Any,
    up_h: Any,
    gate_bias: Any,
    up_bias: Any,
    out: Any,
    function: Any,
    threshold: Any,
    above: Any,
) -> None:
    """As `share_of_activations`, of a gated FFN."""
    _, _, count, _, gate_ahead = gate_place
    _, _, _, _, up_ahead = up_place
    rows = slots.shape[0] * count
    gate_at, up_at = np.empty(CHUNK + gate_ahead, np.int64), np.empty(CHUNK, np.int64)
    # Of the chunk's neurons, and where it is not zero.
    activated, live = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int64)
    start = take(progress, stage) * CHUNK
    while start < rows:
        then = take(progress, stage) * CHUNK  # known now, so that its rows can be asked for
        stop = min(start + CHUNK, rows)
        known = _find_two(slots, gate_place, rows, start, then, gate_at)
        for i in range(start, stop, 4):  # as in dense.py
            i0, i1, i2, i3 = four(i, stop - 1)
            n0, n1, n2, n3 = four(i - start + gate_ahead, known - 1)
            here = gate_at[i0 - start], gate_at[i1 - start], gate_at[i2 - start], gate_at[i3 - start]
            following = gate_at[n0], gate_at[n1], gate_at[n2], gate_at[n3]
            t0, t1, t2, t3 = gate_codec.dots(gates, here, following, gate_h)
            if gate_bias.shape[0] > 0:
                t0 += gate_bias[_neuron(ids, count, i0)]
                t1 += gate_bias[_neuron(ids, count, i1)]
                t2 += gate_bias[_neuron(ids, count, i2)]
                t3 += gate_bias[_neuron(ids, count, i3)]
            activated[i0 - start] = activation(t0, function, threshold)
            activated[i1 - start] = activation(t1, function, threshold)
            activated[i2 - start] = activation(t2, function, threshold)
            activated[i3 - start] = activation(t3, function, threshold)
        _find(slots, up_place, start, stop, up_at)
        alive = 0
        for i in range(start, stop):
            out[i] = 0
            if activated[i - start] != 0:
                live[alive] = i - start
                alive += 1
        for k in range(0, alive, 4):  # the other neurons' up rows are not read
            k0, k1, k2, k3 = four(k, alive - 1)
            n0, n1, n2, n3 = four(k + up_ahead, alive - 1)
            i0, i1, i2, i3 = live[k0], live[k1], live[k2], live[k3]
            here = up_at[i0], up_at[i1], up_at[i2], up_at[i3]
            following = up_at[live[n0]], up_at[live[n1]], up_at[live[n2]], up_at[live[n3]]
            t0, t1, t2, t3 = up_codec.dots(ups, here, following, up_h)
            if up_bias.shape[0] > 0:
                t0 += up_bias[_neuron(ids, count, start + i0)]
                t1 += up_bias[_neuron(ids, count, start + i1)]
                t2 += up_bias[_neuron(ids, count, start + i2)]
                t3 += up_bias[_neuron(ids, count, start + i3)]
            t0, t1 = raised(t0, above, threshold), raised(t1, above, threshold)
            t2, t3 = raised(t2, above, threshold), raised(t3, above, threshold)
            out[start + i0] = activated[i0] * t0
            out[start + i1] = activated[i1] * t1
            out[start + i2] = activated[i2] * t2
            out[start + i3] = activated[i3] * t3
        tell(progress, stage)
        start = then


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
    above: Any,
    threads: Any,
) -> None:
    gate_h, up_h = gate_codec.prepare(h), up_codec.prepare(h)
    progress = stages(1)
    for _ in prange(threads):
        share_of_gated(
            progress,
            0,
            gate_codec,
            up_codec,
            gates,
            ups,
            gate_place,
            up_place,
            ids,
            slots,
            gate_h,
            up_h,
            gate_bias,
            up_bias,
            out,
            function,
            threshold,
            above,
        )


@njit(cache=True, nogil=True)
def ascending(ids: Any, a: Any) -> Any:
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
    places = ascending(ids, a)
    at = slots[places] * stride + first
    add_rows(codec, memory, at, y.shape[0], a[places], y, chunk, threads)
    return places.shape[0]


@njit(fastmath=FAST, nogil=True)
def share_of_outputs(
    progress: Any,
    stage: Any,
    codec: Any,
    memory: Any,
    place: Any,
    order: Any,
    slots: Any,
    width: Any,
    given: Any,
    y: Any,
) -> None:
    """A thread's share of a stage: y[j] += Σ row j of unit u · part u of `given`, unit after unit.

    `order` is that of the units, and `given` is prepared for the units' rows, of `width` values.
    """
    stride, first, _, step, ahead = place
    rows, units = y.shape[0], order.shape[0]
    while True:
        start = take(progress, stage) * _OUTPUTS
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


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _combine(
    codec: Any, memory: Any, place: Any, order: Any, slots: Any, width: Any, x: Any, y: Any, threads: Any
) -> None:
    given = codec.prepare(x)
    progress = stages(1)
    for _ in prange(threads):
        share_of_outputs(progress, 0, codec, memory, place, order, slots, width, given, y)


def pair(numbers: tuple[float, float]) -> tuple[np.float32, np.float32]:
    return np.float32(numbers[0]), np.float32(numbers[1])


def placed(rows: Rows) -> tuple[int, int, int, int, int]:
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
    least, number = pair((threshold, 1.0)), ACTIVATIONS[function]
    _activate(loops(up.codec), memory, placed(up), ids, slots, h, bias, result, number, least, launched)
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
        placed(gate),
        placed(up),
        ids,
        slots,
        h,
        *biases,
        result,
        ACTIVATIONS[ffn.activation],
        pair(ffn.numbers),
        ABOVE[ffn.up_activation],
        launched,
    )
    return result


def accumulate(down: Rows, ids: I32, slots: I32, a: F32, y: F32, threads: int) -> int:
    """y [d_model] += what the units in the lines `slots` add, by ascending ids; both [n], a [n · width].

    The sum of each element is made strictly in that order, so that it may be continued by another call.
    Returns the number of activations that are not zero; the rows of single neurons of which they are zero are
    skipped, which changes nothing.
    """
    codec, memory, place = loops(down.codec), down.memory.reshape(-1), placed(down)
    launched = use_threads(threads, slots.shape[0] * down.count * down.elements * memory.itemsize)
    if down.count > 1:
        order = np.argsort(ids, kind="stable")
        _combine(codec, memory, place, order, slots, down.width, a, y, launched)
        return int(np.count_nonzero(a))
    chunk = columns(y.shape[0], launched)
    active: int = _accumulate(codec, memory, place, ids, slots, a, y, chunk, launched)
    return active
