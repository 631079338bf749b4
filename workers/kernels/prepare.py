"""The vector that rows are multiplied with, in the form that their format takes.

Rows of floats take float32 as it is. Rows in few bits take whole numbers and a scale for each group of
values, `x ≈ scale · whole`, and the sum of the group, which the format's minima are multiplied with:

- eight bits: int16, ± 32,767;
- four bits: `128 · high + low` in two planes of int8, ± 16,319, by PAIR values: the high planes of the values
  that low and high halves of the codes' bytes hold, then the low planes.

The rounding is a three-hundredth of what float16 would round, near a group's largest value, and less than a
hundred-thousandth of a product's terms; `evaluate` measures what it does to a text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from storage.lowbits import CENTRE, RUN, Grouped
from workers.kernels.emitter import PAIR

_SHORTS = 32_767
_PLANES = 127 * 128 + 63
_HALF = RUN // 2


@njit(cache=True, nogil=True)
def _wholes(x: Any, group: Any, most: Any, about: Any, out: Any, scales: Any, sums: Any) -> None:
    """Whole numbers of x, group by group, and `about` times their sums."""
    for number in range(scales.shape[0]):
        some = x[number * group : (number + 1) * group]
        found = out[number * group : (number + 1) * group]
        largest = np.float32(0)
        for j in range(some.shape[0]):
            size = abs(some[j])
            if size > largest or np.isnan(size):  # NaN stays, so that the products are NaN
                largest = size
        inverse = np.float32(0)
        if largest > 0:
            inverse = most / largest
        total = np.int32(0)
        for j in range(some.shape[0]):
            whole = np.int32(np.rint(some[j] * inverse))
            found[j] = np.int16(whole)
            total += whole
        scales[number] = largest / most
        sums[number] = about * scales[number] * np.float32(total)


@njit(cache=True, nogil=True)
def _planes(wholes: Any, out: Any) -> None:
    """Two planes of int8 from whole numbers, PAIR values after PAIR values."""
    for start in range(0, wholes.shape[0], PAIR):
        for run in range(2):
            for half in range(2):
                for j in range(_HALF):
                    whole = np.int32(wholes[start + run * RUN + half * _HALF + j])
                    high = (whole + np.int32(64)) >> np.int32(7)
                    place = 2 * start + half * RUN + run * _HALF + j
                    out[place] = np.int8(high)
                    out[place + PAIR] = np.int8(whole - (high << np.int32(7)))


def preparation(grouped: Grouped) -> Any:
    """For compiled code: the function that prepares x [width] for rows in this format.

    It returns whole numbers, and scales and sums [groups]. Not finite values make products that are not.
    """
    group, bits = grouped.group, grouped.bits
    most = np.float32(_SHORTS if bits == 8 else _PLANES)
    about = np.float32(1 if grouped.minima else -CENTRE)

    def prepare(codec: Any, x: Any) -> Any:
        count = x.shape[0] // group
        shorts = np.empty(x.shape[0], np.int16)
        scales, sums = np.empty(count, np.float32), np.empty(count, np.float32)
        _wholes(x, group, most, about, shorts, scales, sums)
        return shorts, scales, sums

    def prepare_planes(codec: Any, x: Any) -> Any:
        count = x.shape[0] // group
        shorts, planes = np.empty(x.shape[0], np.int16), np.empty(2 * x.shape[0], np.int8)
        scales, sums = np.empty(count, np.float32), np.empty(count, np.float32)
        _wholes(x, group, most, about, shorts, scales, sums)
        _planes(shorts, planes)
        return planes, scales, sums

    return prepare if bits == 8 else prepare_planes
