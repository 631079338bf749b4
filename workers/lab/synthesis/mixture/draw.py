"""Random numbers in few bits, drawn as codes and never rounded: a gigabyte of them takes about a second.

Codes are uniform over all that the bits can say. The scales of groups vary by a quarter and have either sign,
as the formats allow, so that codes that do not lie evenly about zero leave no mean behind; MXFP4's are powers
of two, of two neighbours one. All have so few bits that float16 holds each value exactly: a checkpoint in 16
bits is of the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from storage.codecs import CODECS, F32
from storage.lowbits import CENTRE, RUN, Grouped
from storage.microscaled import TWICE

Codes = npt.NDArray[np.uint8]

_JITTER = np.concatenate([sign * np.linspace(0.75, 1.25, 128) for sign in (-1, 1)])
# Root mean square of a value whose scale is 1, as the scales above vary.
_DEVIATION = {
    4: float(np.sqrt(np.mean((np.arange(16) - 8.0) ** 2) * np.mean(_JITTER**2))),
    8: float(np.sqrt(np.mean(np.maximum(np.arange(-128, 128), -127.0) ** 2) * np.mean(_JITTER**2))),
}
_MXFP4_DEVIATION = float(np.sqrt(np.mean((TWICE / 2.0) ** 2)))  # likewise, of a scale of 1
_BIAS = 127  # the byte that is a scale of 1
_SCALE_BITS = 4  # with the seven of a code eleven, as many as float16 has


def source(*what: object) -> np.random.SFC64:
    """The random source of one tensor."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def random_bytes(bits: np.random.SFC64, count: int) -> Codes:
    return bits.random_raw(-(-count // 8)).view(np.uint8)[:count]


def matrix(bits: np.random.SFC64, rows: int, columns: int, codec: str, deviation: F32 | float) -> Codes:
    """[rows, bytes] of values in `codec`: q8, q4s or mxfp4.

    `deviation` is the standard deviation, [rows or 1, groups or 1].
    """
    if codec == "mxfp4":
        return _microscaled(bits, rows, columns, np.asarray(deviation, np.float32))
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
    made[:, codes:] = _short(drawn, np.rint).astype("<f2").view(np.uint8)
    return made


def _microscaled(bits: np.random.SFC64, rows: int, columns: int, deviation: F32) -> Codes:
    groups = columns // RUN
    made = np.empty((rows, groups * (RUN // 2 + 1)), np.uint8)
    codes, scales = np.split(made, [groups * RUN // 2], axis=1)
    codes[...] = random_bytes(bits, codes.size).reshape(codes.shape)
    wanted = np.where(deviation > 0, deviation, 1) / _MXFP4_DEVIATION
    below = np.floor(np.log2(wanted))
    # Of scales 2^below and twice that the mean square is the one that is wanted.
    upper = (np.square(wanted / 2**below) - 1) / 3
    chance = random_bytes(bits, scales.size).reshape(scales.shape)
    scales[...] = (_BIAS + below + (chance < 256 * upper)).astype(np.uint8)
    silent = np.broadcast_to(deviation == 0, scales.shape)
    codes.reshape(rows, groups, -1)[silent] = 0
    return made


def _short(scales: F32, rounding: np.ufunc) -> F32:
    """Rounded to _SCALE_BITS bits."""
    part, power = np.frexp(scales)
    return np.asarray(np.ldexp(rounding(part * 2**_SCALE_BITS), power - _SCALE_BITS), np.float32)


def put(made: Codes, codec: str, column: int, values: F32) -> None:
    """Write `values` [rows, whole groups] over the rows' own from `column` on, rounded; q8 and q4s."""
    grouped = CODECS[codec].grouped
    assert isinstance(grouped, Grouped)
    width, groups = grouped.group * grouped.bits // 8, values.shape[1] // grouped.group
    first, whole = column // grouped.group, made.shape[1] // grouped.bytes
    apart = values.reshape(len(values), groups, grouped.group)
    scales = _short(np.abs(apart).max(axis=2) / np.float32(2 ** (grouped.bits - 1) - 1), np.ceil)
    codes = np.rint(apart / np.where(scales == 0, 1, scales)[..., None]).astype(np.int16)
    if grouped.bits == 4:
        codes += CENTRE
    rounded = grouped.join(codes, [scales.astype(np.float16)])
    made[:, first * width : (first + groups) * width] = rounded[:, : groups * width]
    start = whole * width + 2 * first
    made[:, start : start + 2 * groups] = rounded[:, groups * width :]


def normal(shape: tuple[int, ...], *what: object) -> F32:
    """Normally distributed, of standard deviation 1."""
    return np.random.Generator(source(*what)).standard_normal(shape, np.float32)
