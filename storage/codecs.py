"""How numbers are stored: the one table of element types, their sizes and their carriers.

A carrier is the numpy type that holds stored values where they are not computed with: numpy has no bfloat16
and numba has neither 16-bit type, so both are held as uint16 and widened to float32 in registers. Rows in
eight and four bits (`lowbits.py`, `microscaled.py`) are held as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from storage.lowbits import Grouped
from storage.microscaled import Microscaled

F32: TypeAlias = npt.NDArray[np.float32]
Carrier: TypeAlias = npt.NDArray[Any]  # stored values, of their codec's carrier type

LARGEST_HALF = 65_504.0


@dataclass(frozen=True, slots=True)
class Codec:
    """A number format. Values come in blocks of `block`, each `bytes` long; floats in blocks of one.

    `widen` and `narrow` take arrays of any shape for floats, and whole rows, along the last axis, for others.
    """

    name: str
    block: int
    bytes: int
    carrier: type[np.generic]
    widen: Callable[[Carrier], F32]  # a float32 copy of stored values
    narrow: Callable[[F32], Carrier]  # float32 rounded to what can be stored
    grouped: Grouped | Microscaled | None = None  # how values are written in few bits; None: as floats

    def size(self, count: int) -> int:
        """Bytes of `count` values, which must be whole blocks."""
        blocks, rest = divmod(count, self.block)
        if rest:
            raise ValueError(f"{count} values are no whole blocks of {self.block} in {self.name}")
        return blocks * self.bytes

    def fits(self, count: int) -> bool:
        """Whether rows of `count` values can be written."""
        return count > 0 if self.grouped is None else self.grouped.fits(count)

    def elements(self, count: int) -> int:
        """Of the carrier, for `count` values in whole blocks."""
        return self.size(count) // np.dtype(self.carrier).itemsize


def _halves(array: Carrier) -> F32:
    return array.view(np.float16).astype(np.float32)


def _to_halves(array: F32) -> Carrier:
    """What is beyond float16's range becomes its largest."""
    return np.clip(array, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).view(np.uint16)


def _brains(array: Carrier) -> F32:
    return (array.astype(np.uint32) << 16).view(np.float32)


def _to_brains(array: F32) -> Carrier:
    """To the nearest, ties to even."""
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


FLOAT32 = Codec("float32", 1, 4, np.float32, lambda array: array.astype(np.float32), lambda array: array)
FLOAT16 = Codec("float16", 1, 2, np.uint16, _halves, _to_halves)
BFLOAT16 = Codec("bfloat16", 1, 2, np.uint16, _brains, _to_brains)

FLOATS = (FLOAT32.name, FLOAT16.name, BFLOAT16.name)  # what checkpoints may hold


def _low(name: str, bits: int, minima: bool = False) -> list[Codec]:
    """A format in few bits by its groups; groups of 32 have the plain name."""
    found = []
    for group in (32, 64, 128):
        grouped = Grouped(bits, group, minima)
        full = name if group == 32 else f"{name}g{group}"
        found.append(Codec(full, group, grouped.bytes, np.uint8, grouped.widen, grouped.narrow, grouped))
    return found


# `q4` has minima; `q4s` lies about zero, and takes half a bit less a value in groups of 32.
LOW_BITS = (*_low("q8", 8), *_low("q4", 4, minima=True), *_low("q4s", 4))
_MICRO = Microscaled()
MXFP4 = Codec("mxfp4", _MICRO.group, _MICRO.bytes, np.uint8, _MICRO.widen, _MICRO.narrow, _MICRO)
CODECS: dict[str, Codec] = {codec.name: codec for codec in (FLOAT32, FLOAT16, BFLOAT16, *LOW_BITS, MXFP4)}


def widen(array: Carrier, name: str) -> F32:
    """A float32 copy of values stored in the codec `name`."""
    return CODECS[name].widen(array)


def narrow(array: F32, name: str) -> Carrier:
    """`array` rounded to the codec `name`, in its carrier."""
    return CODECS[name].narrow(array)
