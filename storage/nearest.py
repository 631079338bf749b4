"""The whole numbers that come nearest to groups of values: compiled, for a search tries many scales.

Groups are float32 `[rows, groups, group]`, codes int16, scales and minima float32 numbers that float16 holds.
Of equal errors the first found stays, and every group is one thread's: nothing depends on threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

F32 = npt.NDArray[np.float32]
I16 = npt.NDArray[np.int16]

# Tried as the scale of a group, as shares of what its largest value, or its range, asks for.
SHARES = np.linspace(0.8, 1.1, 13, dtype=np.float32)
SUMS = {"reassoc", "nsz"}  # sums may be cut into lanes
_LARGEST = np.float32(65_504)  # of float16
_NORMAL = np.float32(2.0**-14)  # its smallest number of full precision


def about_zero(x: F32, bits: int) -> tuple[I16, F32]:
    """Codes -127 to 127, or of four bits -8 to 7, and scales `[rows, groups]`: of several the best."""
    codes, scales = np.empty(x.shape, np.int16), np.empty(x.shape[:2], np.float32)
    _about_zero(x, SHARES, bits, codes, scales)
    return codes, scales


def between(x: F32, bits: int) -> tuple[I16, F32, F32]:
    """Codes from 0, scales and minima: the best of several ranges, each refined by least squares."""
    codes, scales = np.empty(x.shape, np.int16), np.empty(x.shape[:2], np.float32)
    minima = np.empty_like(scales)
    _between(x, SHARES, np.float32(2**bits - 1), codes, scales, minima)
    return codes, scales, minima


@njit(cache=True)
def _half(value: Any) -> Any:
    """As float16 has it, rounded to even; what is beyond becomes its largest."""
    size = min(np.float32(abs(value)), _LARGEST)
    if size < _NORMAL:  # steps of 2^-24, which float32 has above one half
        rounded = np.float32(size + np.float32(0.5)) - np.float32(0.5)
    else:  # ten bits of the fraction's 23 stay
        word = np.int64(np.float32(size).view(np.int32))
        word = (word + 0xFFF + (word >> 13 & 1)) & ~0x1FFF
        rounded = np.int32(word).view(np.float32)
    return rounded if value >= 0 else -rounded


@njit(cache=True)
def _inverse(scale: Any) -> Any:
    """Codes of a scale of zero are zero."""
    return np.float32(1) / scale if scale != 0 else np.float32(0)


@njit(fastmath=SUMS, cache=True)
def _error(values: Any, scale: Any, minimum: Any, low: Any, high: Any) -> Any:
    """Of the nearest codes of one group, squared."""
    inverse, error = _inverse(scale), np.float32(0)
    for i in range(values.shape[0]):
        above = values[i] - minimum
        apart = above - scale * min(max(np.rint(above * inverse), low), high)
        error += apart * apart
    return error


@njit(fastmath=SUMS, cache=True)
def _line(values: Any, scale: Any, minimum: Any, high: Any) -> Any:
    """Scale and minimum with which these codes come nearest; the given ones where all codes are one."""
    inverse, total, mean = _inverse(scale), np.float32(0), np.float32(0)
    count = np.float32(values.shape[0])
    for i in range(values.shape[0]):
        total += min(max(np.rint((values[i] - minimum) * inverse), np.float32(0)), high)
        mean += values[i]
    centre, mean = total / count, mean / count
    spread, along = np.float32(0), np.float32(0)
    for i in range(values.shape[0]):
        code = min(max(np.rint((values[i] - minimum) * inverse), np.float32(0)), high) - centre
        spread += code * code
        along += code * values[i]
    if spread <= 0:
        return scale, minimum
    slope = along / spread
    return _half(slope), _half(mean - slope * centre)


@njit(fastmath=SUMS, cache=True)
def _write(values: Any, scale: Any, minimum: Any, low: Any, high: Any, codes: Any) -> None:
    inverse = _inverse(scale)
    for i in range(values.shape[0]):
        codes[i] = np.int16(min(max(np.rint((values[i] - minimum) * inverse), low), high))


@njit(parallel=True, cache=True)
def _about_zero(x: Any, shares: Any, bits: Any, codes: Any, scales: Any) -> None:
    low, high = (np.float32(-127), np.float32(127)) if bits == 8 else (np.float32(-8), np.float32(7))
    for row in prange(x.shape[0]):
        for group in range(x.shape[1]):
            values = x[row, group]
            largest = np.float32(0)
            for value in values:
                if abs(value) > abs(largest):
                    largest = value
            # Four bits reach one further below zero: the largest value goes there, whatever its sign.
            whole = abs(largest) / high if bits == 8 else largest / low
            least, best = np.float32(np.inf), np.float32(0)
            for share in shares:
                scale = _half(whole * share)
                error = _error(values, scale, np.float32(0), low, high)
                if error < least:
                    least, best = error, scale
            scales[row, group] = best
            _write(values, best, np.float32(0), low, high, codes[row, group])


@njit(parallel=True, cache=True)
def _between(x: Any, shares: Any, top: Any, codes: Any, scales: Any, minima: Any) -> None:
    none = np.float32(0)
    for row in prange(x.shape[0]):
        for group in range(x.shape[1]):
            values = x[row, group]
            low, high = values.min(), values.max()
            least, best, base = np.float32(np.inf), none, none
            for share in shares:
                trim = (high - low) * (np.float32(1) - share) / np.float32(2)
                scale, minimum = _half((high - low) * share / top), _half(low + trim)
                for refined in range(2):
                    if refined:
                        scale, minimum = _line(values, scale, minimum, top)
                    error = _error(values, scale, minimum, none, top)
                    if error < least:
                        least, best, base = error, scale, minimum
            scales[row, group], minima[row, group] = best, base
            _write(values, best, base, none, top, codes[row, group])
