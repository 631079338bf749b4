"""The inner loops: dot products of four rows at once, and sums of rows. For every codec, on one thread.

A row lies in flat memory, an array of its codec's carrier, from some element on. Loops call the methods of
what `loops` gives for a codec, and do not know how it writes numbers. Of floats those methods are the
functions here, and of few bits those in `grouped.py` and `microscaled.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload_method

from storage.codecs import MXFP4, Codec
from workers.kernels import grouped
from workers.kernels.codecs import Scalars, ScalarsType, scalars
from workers.kernels.grouped import Groups, GroupsType
from workers.kernels.launch import FAST
from workers.kernels.microscaled import MICRO, Micro, MicroType
from workers.kernels.prepare import preparation

LINE = 32  # 16-bit elements of a cache line
_BLOCK = 128  # elements of a row between two looks ahead, a multiple of a cache line's


@intrinsic
def _fetch(typing_context: Any, row: Any, index: Any) -> Any:
    """Ask for the cache line of row[index], without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        read, near, data_cache = ir.Constant(word, 0), ir.Constant(word, 2), ir.Constant(word, 1)
        builder.call(prefetch, [builder.bitcast(builder.gep(data, [args[1]]), byte), read, near, data_cache])
        return context.get_dummy_value()

    return types.void(row, types.int64), generate


fetch: Any = _fetch  # called by compiled code with the row and the index alone


@njit(inline="always")
def four(i: Any, last: Any) -> Any:
    """The four places from `i` on. At the end the last one several times: its result is the same bits."""
    return min(i, last), min(i + 1, last), min(i + 2, last), min(i + 3, last)


@njit(fastmath=FAST)
def dots(codec: Any, rows: Any, following: Any, x: Any) -> Any:
    """Sums of row[j] · x[j] for each of four rows at once, while the four `following` rows are asked for.

    The rows may lie anywhere. A row's sum is the same bits whichever rows are its neighbours. Asking for
    rows matters where one core must fetch them, because the other is busy: a token of OPT-6.7B's shape took
    one thread 464 instead of 513 ms, and two threads, at the memory's speed, 279 either way.
    """
    r0, r1, r2, r3 = rows
    n0, n1, n2, n3 = following
    t0 = t1 = t2 = t3 = np.float32(0)
    for start in range(0, x.shape[0], _BLOCK):
        stop = min(start + _BLOCK, x.shape[0])
        for j in range(start, stop, LINE):
            fetch(n0, j)
            fetch(n1, j)
            fetch(n2, j)
            fetch(n3, j)
        b0, b1, b2, b3 = r0[start:stop], r1[start:stop], r2[start:stop], r3[start:stop]
        some = x[start:stop]
        s0 = s1 = s2 = s3 = np.float32(0)
        for j in range(some.shape[0]):
            s0 += codec.widen(b0[j]) * some[j]
            s1 += codec.widen(b1[j]) * some[j]
            s2 += codec.widen(b2[j]) * some[j]
            s3 += codec.widen(b3[j]) * some[j]
        t0 += s0
        t1 += s1
        t2 += s2
        t3 += s3
    return t0, t1, t2, t3


# Without reassociation: y must be summed in the order of the calls, however they are grouped.
@njit(fastmath={"contract"})
def add_four(codec: Any, y: Any, a: Any, r0: Any, r1: Any, r2: Any, r3: Any) -> None:
    """y[j] += a[0] · r0[j], then a[1] · r1[j], and so on."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    for j in range(y.shape[0]):
        t = y[j] + a0 * codec.widen(r0[j])
        t += a1 * codec.widen(r1[j])
        t += a2 * codec.widen(r2[j])
        y[j] = t + a3 * codec.widen(r3[j])


@njit(fastmath={"contract"})
def add_one(codec: Any, y: Any, a: Any, row: Any) -> None:
    """As `add_four`, for what is left of the rows."""
    for j in range(y.shape[0]):
        y[j] += a * codec.widen(row[j])


@dataclass(slots=True)
class Activations:
    """How this process multiplies rows in few bits with float32: chosen once, before it computes."""

    exact: bool = False  # values are not rounded to whole numbers; those of MXFP4 never are


ACTIVATIONS = Activations()


def loops(codec: Codec) -> Scalars | Groups | Micro:
    """What kernels take for `codec`. Raises KeyError for one that no kernel can compute with."""
    if codec is MXFP4:
        return MICRO
    return scalars(codec) if codec.grouped is None else grouped.groups(codec, ACTIVATIONS.exact)


# What compiled code may ask of any of them. `at` and `following` are elements of `memory`: four, or one.


@overload_method(ScalarsType, "dots", inline="always")
def _float_dots(codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
    """Products of four rows with a prepared x, while four following rows are asked for."""

    def run(codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
        a, b, c, d = at
        e, f, g, h = following
        n = x.shape[0]
        rows = (memory[a : a + n], memory[b : b + n], memory[c : c + n], memory[d : d + n])
        later = (memory[e : e + n], memory[f : f + n], memory[g : g + n], memory[h : h + n])
        return dots(codec, rows, later, x)

    return run


@overload_method(GroupsType, "dots", inline="always")
def _grouped_dots(codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
    def run(codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
        return grouped.dots(codec, memory, at, following, x)

    return run


@overload_method(MicroType, "prepare", inline="always")
@overload_method(ScalarsType, "prepare", inline="always")
def _float_prepare(codec: Any, x: Any) -> Any:
    """x [width], float32, as rows in this codec are multiplied with it."""

    def run(codec: Any, x: Any) -> Any:
        return x

    return run


@overload_method(GroupsType, "prepare")
def _grouped_prepare(codec: Any, x: Any) -> Any:
    return preparation(codec)


@overload_method(MicroType, "part", inline="always")
@overload_method(ScalarsType, "part", inline="always")
def _float_part(codec: Any, x: Any, start: Any, stop: Any) -> Any:
    """Some values of a prepared x, whole groups of them."""

    def part(codec: Any, x: Any, start: Any, stop: Any) -> Any:
        return x[start:stop]

    return part


@overload_method(GroupsType, "part", inline="always")
def _grouped_part(codec: Any, x: Any, start: Any, stop: Any) -> Any:
    form = grouped.format_of(codec)
    group, bits = form.group, form.bits

    def part(codec: Any, x: Any, start: Any, stop: Any) -> Any:
        values, scales, sums = x
        low, high = start // group, stop // group
        return values[:, start // 2 : stop // 2], scales[low:high], sums[low:high]

    def eight(codec: Any, x: Any, start: Any, stop: Any) -> Any:
        values, scales = x
        return values[:, start:stop], scales[start // group : stop // group]

    def exact(codec: Any, x: Any, start: Any, stop: Any) -> Any:
        values, sums = x
        return values[start:stop], sums[start // group : stop // group]

    def exact_eight(codec: Any, x: Any, start: Any, stop: Any) -> Any:
        return (x[0][start:stop],)

    if codec.exact:
        return exact if bits == 4 else exact_eight
    return part if bits == 4 else eight


@overload_method(ScalarsType, "add_four", inline="always")
def _float_add_four(
    codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
) -> Any:
    """y += a[0] · part of row 0, and so on: as many values as y has, from `column` on, of rows of `width`."""

    def run(
        codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
    ) -> None:
        first, second, third, fourth = at
        n = y.shape[0]
        add_four(
            codec,
            y,
            a,
            memory[first + column : first + column + n],
            memory[second + column : second + column + n],
            memory[third + column : third + column + n],
            memory[fourth + column : fourth + column + n],
        )

    return run


@overload_method(GroupsType, "add_four", inline="always")
def _grouped_add_four(
    codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
) -> Any:
    def run(
        codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
    ) -> None:
        grouped.add_four(codec, y, a, memory, at, following, column, width)

    return run


@overload_method(ScalarsType, "add_one", inline="always")
def _float_add_one(codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> Any:
    """As `add_four`, for one row, and one number."""

    def run(codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> None:
        add_one(codec, y, a, memory[at + column : at + column + y.shape[0]])

    return run


@overload_method(GroupsType, "add_one", inline="always")
def _grouped_add_one(codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> Any:
    def run(codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> None:
        grouped.add_one(codec, y, a, memory, at, column, width)

    return run


@overload_method(ScalarsType, "widen_row", inline="always")
def _float_widen_row(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> Any:
    """out = part of a row of `width`, from `column` on, as float32."""

    def widen_row(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> None:
        row = memory[at + column : at + column + out.shape[0]]
        for j in range(out.shape[0]):
            out[j] = codec.widen(row[j])

    return widen_row


@overload_method(GroupsType, "widen_row", inline="always")
def _grouped_widen_row(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> Any:
    def widen_row(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> None:
        grouped.widen(codec, memory, at, column, width, out)

    return widen_row
