"""Rows of a GGUF file taken over in the bits that they have.

A block of 32 values with one scale, or with a scale and a minimum, is what a group of ours is; only its bytes
are put elsewhere (`storage/lowbits.py`, `microscaled.py`). Q8_0, Q5_0, Q4_0, Q4_1 and MXFP4 lose nothing.
Q4_K has whole numbers for the scales of its groups, times one float16: their product is rounded to float16,
and no code changes.

Q5_1, Q5_K and Q6_K have no counterpart and become eight bits, rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from storage.codecs import CODECS, MXFP4
from storage.lowbits import Codes, Grouped
from storage.microscaled import Microscaled

CODEC = {
    "Q8_0": "q8",
    "Q5_0": "q8",
    "Q5_1": "q8",
    "Q5_K": "q8",
    "Q6_K": "q8",
    "Q4_0": "q4s",
    "Q4_1": "q4",
    "Q4_K": "q4",
    "MXFP4": MXFP4.name,
}
_BLOCK = 32  # values
_SUPER = 256  # values of a block of the K kinds
Halves = npt.NDArray[np.float16]


def kept(rows: Codes, kind: str) -> Codes | None:
    """[n, bytes] in `CODEC[kind]`, of rows as the file has them; None where they must be rounded."""
    if kind == "MXFP4":
        return _mxfp4(rows)
    take = _TAKEN.get(kind)
    return None if take is None else take(rows, _grouped(kind))


def _grouped(kind: str) -> Grouped:
    grouped = CODECS[CODEC[kind]].grouped
    assert isinstance(grouped, Grouped)
    return grouped


def _mxfp4(rows: Codes) -> Codes:
    """A scale, and the codes packed as ours."""
    blocks = rows.reshape(rows.shape[0], -1, 1 + _BLOCK // 2)
    return Microscaled().join(blocks[:, :, 1:], blocks[:, :, 0])


def _halves(blocks: Codes, start: int) -> Halves:
    """The float16 at byte `start` of each block, of [n, blocks, bytes]."""
    found: Halves = np.ascontiguousarray(blocks[:, :, start : start + 2]).view("<f2")[:, :, 0]
    return found


def _nibbles(packed: Codes) -> npt.NDArray[np.int16]:
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)


def _q8_0(rows: Codes, grouped: Grouped) -> Codes:
    blocks = rows.reshape(rows.shape[0], -1, 2 + _BLOCK)
    codes = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).astype(np.int16)
    return grouped.join(codes, [_halves(blocks, 0)])


def _q4_0(rows: Codes, grouped: Grouped) -> Codes:
    blocks = rows.reshape(rows.shape[0], -1, 2 + _BLOCK // 2)
    return grouped.join(_nibbles(blocks[:, :, 2:]), [_halves(blocks, 0)])


def _q4_1(rows: Codes, grouped: Grouped) -> Codes:
    blocks = rows.reshape(rows.shape[0], -1, 4 + _BLOCK // 2)
    return grouped.join(_nibbles(blocks[:, :, 4:]), [_halves(blocks, 0), _halves(blocks, 2)])


def _q5_0(rows: Codes, grouped: Grouped) -> Codes:
    """A scale, the fifth bits of all 32 codes, the others; zero is 16."""
    blocks = rows.reshape(rows.shape[0], -1, 6 + _BLOCK // 2)
    fifth = np.unpackbits(blocks[:, :, 2:6], axis=-1, bitorder="little").astype(np.int16)
    return grouped.join(_nibbles(blocks[:, :, 6:]) + (fifth << 4) - 16, [_halves(blocks, 0)])


def _q4_k(rows: Codes, grouped: Grouped) -> Codes:
    """Eight groups: the float16 of scales and of minima, six bits each of eight of both, then the codes."""
    blocks = rows.reshape(rows.shape[0], -1, _SUPER // 2 + 16)
    numbers = blocks[:, :, 4:16].astype(np.int16)
    first, second, third = numbers[..., :4], numbers[..., 4:8], numbers[..., 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    tables = [
        (_halves(blocks, start)[..., None].astype(np.float32) * whole).astype(np.float16)
        for start, whole in ((0, scales), (2, -minima))
    ]
    packed = blocks[:, :, 16:].reshape(*blocks.shape[:2], 4, _BLOCK)  # two groups in each 32 bytes
    codes = np.stack([packed & 15, packed >> 4], axis=-2).astype(np.int16)
    shape = rows.shape[0], -1
    return grouped.join(codes.reshape(*shape, _BLOCK), [table.reshape(shape) for table in tables])


_TAKEN: dict[str, Callable[[Codes, Grouped], Codes]] = {
    "Q8_0": _q8_0,
    "Q5_0": _q5_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
}
