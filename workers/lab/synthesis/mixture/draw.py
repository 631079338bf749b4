"""Random numbers in few bits, drawn as codes and never rounded: a gigabyte of them takes about a second.

Codes are uniform over all that the bits can say. The scales of groups vary by a quarter and have either sign,
as the formats allow, so that codes that do not lie evenly about zero leave no mean behind.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from storage.codecs import CODECS, F32
from storage.lowbits import Grouped

Codes = npt.NDArray[np.uint8]

_JITTER = np.concatenate([sign * np.linspace(0.75, 1.25, 128) for sign in (-1, 1)])
# Root mean square of a value whose scale is 1, as the scales above vary.
_DEVIATION = {
    4: float(np.sqrt(np.mean((np.arange(16) - 8.0) ** 2) * np.mean(_JITTER**2))),
    8: float(np.sqrt(np.mean(np.maximum(np.arange(-128, 128), -127.0) ** 2) * np.mean(_JITTER**2))),
}


def source(*what: object) -> np.random.SFC64:
    """The random source of one tensor."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def random_bytes(bits: np.random.SFC64, count: int) -> Codes:
    return bits.random_raw(-(-count // 8)).view(np.uint8)[:count]


def matrix(bits: np.random.SFC64, rows: int, columns: int, codec: str, deviation: F32 | float) -> Codes:
    """[rows, bytes] of values in `codec` (q8 or q4s) with standard deviations [rows or 1, groups or 1]."""
    grouped = CODECS[codec].grouped
    assert isinstance(grouped, Grouped)
    assert not grouped.minima
    codes, groups = columns * grouped.bits // 8, columns // grouped.group
    made = np.empty((rows, codes + 2 * groups), np.uint8)
    made[:, :codes] = random_bytes(bits, rows * codes).reshape(rows, codes)
    if grouped.bits == 8:  # -128 is no code that every program reads
        signed = made[:, :codes].view(np.int8)
        np.maximum(signed, -127, out=signed)
    drawn = _JITTER.astype(np.float32)[random_bytes(bits, rows * groups).reshape(rows, groups)]
    drawn *= np.asarray(deviation, np.float32) / np.float32(_DEVIATION[grouped.bits])
    made[:, codes:] = drawn.astype("<f2").view(np.uint8)
    return made


def put(made: Codes, codec: str, column: int, values: F32) -> None:
    """Write `values` [rows, whole groups] over the rows' own from `column` on, rounded."""
    grouped = CODECS[codec].grouped
    assert grouped is not None
    width, groups = grouped.group * grouped.bits // 8, values.shape[1] // grouped.group
    first, whole = column // grouped.group, made.shape[1] // grouped.bytes
    rounded = grouped.narrow(values)
    made[:, first * width : (first + groups) * width] = rounded[:, : groups * width]
    start = whole * width + 2 * first
    made[:, start : start + 2 * groups] = rounded[:, groups * width :]


def normal(shape: tuple[int, ...], *what: object) -> F32:
    """Normally distributed, of standard deviation 1."""
    return np.random.Generator(source(*what)).standard_normal(shape, np.float32)
