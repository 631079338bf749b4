"""What the loops need of rows in MXFP4: the same calls as of other rows, in `rows.py`.

Codes are whole numbers, small enough to be found without a table; products are made in float32 with the
vector as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import NativeValue, models, overload_method, register_model, unbox

from storage.lowbits import RUN
from workers.kernels.codecs import as_float, digest
from workers.kernels.launch import FAST

_HALF = RUN // 2  # bytes of a group's codes


@dataclass(frozen=True)
class Micro:
    """MXFP4, as compiled code takes it: without a value, with a type of its own."""

    @cached_property
    def _numba_type_(self) -> MicroType:  # what numba asks an argument for
        return MicroType(digest())


class MicroType(types.Type):
    """The type of `Micro` in compiled code."""

    def __init__(self, revision: str) -> None:
        super().__init__(f"Micro({revision})")


register_model(MicroType)(models.OpaqueModel)


@unbox(MicroType)  # type: ignore[no-untyped-call, untyped-decorator]
def _without_value(kind: Any, value: Any, compiled: Any) -> Any:
    return NativeValue(compiled.context.get_dummy_value())  # type: ignore[no-untyped-call]


MICRO = Micro()


@njit(inline="always")
def _doubled(code: Any) -> Any:
    """Twice a code's value: 0, 1, 2, 3, 4, 6, 8, 12, and with bit 3 what is below zero."""
    size = np.int32(code) & np.int32(7)
    if size >= 6:
        size = 4 * size - 16
    elif size >= 4:
        size = 2 * size - 4
    return np.float32(-size if code & 8 else size)


@njit(inline="always")
def _halved(scale: Any) -> Any:
    """2 ^ (scale - 128). Below 2 ^ -126 there are the numbers without a leading one."""
    byte = np.uint32(scale)
    if byte < 2:
        return as_float(np.uint32(np.uint32(0x00200000) << byte))
    return as_float(np.uint32((byte - np.uint32(1)) << np.uint32(23)))


@njit(fastmath=FAST)
def _dot(memory: Any, at: Any, x: Any) -> Any:
    """The product of one row of x's width. Sixteen sums, so that they are made side by side."""
    groups = x.shape[0] // RUN
    scales = memory[at + groups * _HALF : at + groups * (_HALF + 1)]
    total = np.float32(0)
    for group in range(groups):
        codes = memory[at + group * _HALF : at + (group + 1) * _HALF]
        low = x[group * RUN : group * RUN + _HALF]
        high = x[group * RUN + _HALF : (group + 1) * RUN]
        part = np.float32(0)
        for j in range(_HALF):
            part += _doubled(codes[j] & 15) * low[j] + _doubled(codes[j] >> 4) * high[j]
        total += _halved(scales[group]) * part
    return total


@njit(fastmath={"contract"})  # y must be summed in the order of the calls, as in `rows.py`
def _add(y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> None:
    """y[j] += a · the value column + j of a row. `column` and y's length are whole groups."""
    scales = at + width // 2
    for start in range(0, y.shape[0], RUN):
        group = (column + start) // RUN
        factor = _halved(memory[scales + group])
        codes = memory[at + group * _HALF : at + (group + 1) * _HALF]
        for j in range(_HALF):
            y[start + j] += a * (factor * _doubled(codes[j] & 15))
            y[start + _HALF + j] += a * (factor * _doubled(codes[j] >> 4))


@njit
def _widen(memory: Any, at: Any, column: Any, width: Any, out: Any) -> None:
    scales = at + width // 2
    for start in range(0, out.shape[0], RUN):
        group = (column + start) // RUN
        factor = _halved(memory[scales + group])
        codes = memory[at + group * _HALF : at + (group + 1) * _HALF]
        for j in range(_HALF):
            out[start + j] = factor * _doubled(codes[j] & 15)
            out[start + _HALF + j] = factor * _doubled(codes[j] >> 4)


@overload_method(MicroType, "dots", inline="always")
def _dots(codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
    def run(codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
        a, b, c, d = at
        return _dot(memory, a, x), _dot(memory, b, x), _dot(memory, c, x), _dot(memory, d, x)

    return run


@overload_method(MicroType, "add_four", inline="always")
def _add_four(
    codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
) -> Any:
    def run(
        codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
    ) -> None:
        first, second, third, fourth = at
        _add(y, a[0], memory, first, column, width)
        _add(y, a[1], memory, second, column, width)
        _add(y, a[2], memory, third, column, width)
        _add(y, a[3], memory, fourth, column, width)

    return run


@overload_method(MicroType, "add_one", inline="always")
def _add_one(codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> Any:
    def run(codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> None:
        _add(y, a, memory, at, column, width)

    return run


@overload_method(MicroType, "widen_row", inline="always")
def _widen_row(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> Any:
    def widen_row(codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> None:
        _widen(memory, at, column, width, out)

    return widen_row
