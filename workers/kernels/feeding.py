"""A layer's FFN where all units of a sum are there: one launch from its input to its output.

Its stages are the activations, and the sum of what they contribute: those of `ffn.py`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import njit, prange

from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import I32, Rows
from workers.kernels.ffn import (
    ABOVE,
    ascending,
    pair,
    placed,
    share_of_activations,
    share_of_gated,
    share_of_outputs,
)
from workers.kernels.functions import ACTIVATIONS
from workers.kernels.launch import FAST, chunks_of, stages, use_threads, wait
from workers.kernels.rows import loops
from workers.kernels.sums import columns, share_of_rows

_ACTIVATED, _SUMMED = range(2)  # stages


@njit(nogil=True)
def _share_of_sum(
    progress: Any,
    down: Any,
    memory: Any,
    place: Any,
    width: Any,
    ids: Any,
    slots: Any,
    a: Any,
    y: Any,
    chunk: Any,
) -> None:
    """A thread's share of y += what the units add. Each thread orders them for itself: less than a wait."""
    stride, first, count, _, _ = place
    if count > 1:
        order = ascending(ids, np.ones(ids.shape[0], np.float32))
        share_of_outputs(progress, _SUMMED, down, memory, place, order, slots, width, down.prepare(a), y)
    else:
        places = ascending(ids, a)
        at = slots[places] * stride + first
        share_of_rows(progress, _SUMMED, down, memory, at, y.shape[0], a[places], y, chunk)


@njit(nogil=True)
def _live(a: Any) -> Any:
    """How many are not zero."""
    count = 0
    for value in a:
        count += value != 0
    return count


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _feed(
    up: Any,
    up_memory: Any,
    up_place: Any,
    up_bias: Any,
    down: Any,
    down_memory: Any,
    down_place: Any,
    down_width: Any,
    chunk: Any,
    function: Any,
    threshold: Any,
    ids: Any,
    slots: Any,
    x: Any,
    a: Any,
    y: Any,
    threads: Any,
) -> Any:
    given = up.prepare(x)
    progress = stages(2)
    for _ in prange(threads):
        share_of_activations(
            progress, _ACTIVATED, up, up_memory, up_place, ids, slots, given, up_bias, a, function, threshold
        )
        wait(progress, _ACTIVATED, chunks_of(a.shape[0]))
        _share_of_sum(progress, down, down_memory, down_place, down_width, ids, slots, a, y, chunk)
    return _live(a)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _feed_gated(
    gate: Any,
    gate_memory: Any,
    gate_place: Any,
    gate_bias: Any,
    up: Any,
    up_memory: Any,
    up_place: Any,
    up_bias: Any,
    down: Any,
    down_memory: Any,
    down_place: Any,
    down_width: Any,
    chunk: Any,
    function: Any,
    numbers: Any,
    above: Any,
    ids: Any,
    slots: Any,
    x: Any,
    a: Any,
    y: Any,
    threads: Any,
) -> Any:
    gate_x, up_x = gate.prepare(x), up.prepare(x)
    progress = stages(2)
    for _ in prange(threads):
        share_of_gated(
            progress,
            _ACTIVATED,
            gate,
            up,
            gate_memory,
            up_memory,
            gate_place,
            up_place,
            ids,
            slots,
            gate_x,
            up_x,
            gate_bias,
            up_bias,
            a,
            function,
            numbers,
            above,
        )
        wait(progress, _ACTIVATED, chunks_of(a.shape[0]))
        _share_of_sum(progress, down, down_memory, down_place, down_width, ids, slots, a, y, chunk)
    return _live(a)


_launch: Any = _feed  # called with tuples of what does not change
_launch_gated: Any = _feed_gated


class Feeding:
    """One layer's FFN, all that it needs of the memory in which its units lie looked up once."""

    def __init__(self, rows: Mapping[str, Rows], biases: tuple[F32, F32], ffn: Ffn, threads: int) -> None:
        """`rows` by role; `biases` are the gate's, empty where there is none, and the up-projection's."""
        gate_bias, up_bias = biases
        down, number, numbers = rows["down"], ACTIVATIONS[ffn.activation], pair(ffn.numbers)
        outputs = down.count if down.count > 1 else down.width
        summed = (*_described(down), down.width, columns(outputs, threads), number, numbers)
        self._gated = ffn.kind == "gated"
        self._bound: tuple[Any, ...] = (*_described(rows["up"]), up_bias, *summed)
        if self._gated:
            self._bound = (*_described(rows["gate"]), gate_bias, *self._bound, ABOVE[ffn.up_activation])
        self._unit_bytes = sum(one.count * one.elements * one.memory.itemsize for one in rows.values())
        self._threads = threads

    def __call__(self, ids: I32, slots: I32, x: F32, a: F32, y: F32) -> int:
        """y [d_model] += what the units `ids` in the lines `slots` add, both [n], for the input x [d_model].

        Their activations come into a [n · width]. Returns the number of those that are not zero.
        """
        launched = use_threads(self._threads, slots.shape[0] * self._unit_bytes)
        launch = _launch_gated if self._gated else _launch
        active: int = launch(*self._bound, ids, slots, x, a, y, launched)
        return active


def _described(rows: Rows) -> tuple[Any, ...]:
    """A role's rows as compiled code takes them: codec, flat memory, and where they lie in it."""
    return loops(rows.codec), rows.memory.reshape(-1), placed(rows)
