"""MXFP4, as the Open Compute Project's "Microscaling Formats" 1.0 has it: four bits under a power of two.

A group of 32 values shares one byte of scale, `2 ^ (byte - 127)`, and a code is a sign and one of 0, ½, 1,
1½, 2, 3, 4 and 6. Computed is with twice that, a whole number, and half the scale, as GGUF does. Both are
exact in float32. FORMAT.md, "Codecs".

A row of `n` values is one run of bytes: the codes of all groups, packed as in `lowbits.py`, then their
scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.lowbits import RUN, Codes

F32 = npt.NDArray[np.float32]

TWICE = np.array(
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8
)  # a code's value, doubled
_BETWEEN = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)  # where the next code is nearer
_LARGEST_SCALE = 254  # 255 is no number


@dataclass(frozen=True, slots=True)
class Microscaled:
    """How values are written in MXFP4; what `lowbits.Grouped` is for whole numbers."""

    bits: int = 4
    group: int = RUN

    @property
    def bytes(self) -> int:
        """Of one group, with its scale."""
        return self.group // 2 + 1

    def fits(self, width: int) -> bool:
        """Whether rows of `width` values can be written: whole pairs of runs."""
        return width > 0 and width % (2 * RUN) == 0

    def join(self, packed: Codes, scales: Codes) -> Codes:
        """[rows, bytes] from packed codes [rows, groups, 16] and scales [rows, groups]."""
        return np.concatenate([packed.reshape(len(packed), -1), scales], axis=1)

    def split(self, stored: Codes) -> tuple[Codes, Codes]:
        """The inverse of `join`, of [rows, bytes]."""
        groups = stored.shape[1] // self.bytes
        end = groups * self.group // 2
        return stored[:, :end].reshape(len(stored), groups, -1), stored[:, end:]

    def cut(self, stored: Codes, count: int) -> Codes:
        """Rows cut into `count` parts of whole groups: [count, rows, bytes] from [rows, bytes]."""
        packed, scales = self.split(stored)
        parts = zip(np.split(packed, count, axis=1), np.split(scales, count, axis=1), strict=True)
        return np.stack([self.join(some, theirs) for some, theirs in parts])

    def widen(self, stored: Codes) -> F32:
        """[..., values] from [..., bytes], exact."""
        packed, scales = self.split(stored.reshape(-1, stored.shape[-1]))
        codes = np.concatenate([packed & 15, packed >> 4], axis=2)
        values: F32 = TWICE[codes].astype(np.float32) * halved(scales)[..., None]
        return values.reshape(*stored.shape[:-1], -1)

    def narrow(self, values: F32) -> Codes:
        """[..., bytes] from [..., values]: of two scales for a group the one of least squared error.

        Raises ValueError for values that are not finite.
        """
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite have no codes")
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
        groups = rows.reshape(len(rows), -1, self.group)
        _, exponents = np.frexp(np.abs(groups).max(axis=2))  # the largest lies below 2 ^ exponent
        least = np.full(exponents.shape, np.inf)
        codes, scales = np.zeros(groups.shape, np.uint8), np.zeros(exponents.shape, np.uint8)
        for more in (0, 1):  # the largest code is 6, so that what lies above 7 is nearer to twice as much
            tried = np.clip(exponents - 3 + 127 + more, 0, _LARGEST_SCALE).astype(np.uint8)
            found = _nearest(groups / halved(tried)[..., None])
            errors = np.square(groups - TWICE[found] * halved(tried)[..., None]).sum(axis=2, dtype=np.float64)
            better = errors < least
            codes, scales = np.where(better[..., None], found, codes), np.where(better, tried, scales)
            least = np.where(better, errors, least)
        packed = (codes[..., : RUN // 2] | codes[..., RUN // 2 :] << 4).astype(np.uint8)
        return self.join(packed, scales).reshape(*values.shape[:-1], -1)


def halved(scales: Codes) -> F32:
    """`2 ^ (byte - 128)`: what doubled codes are multiplied with."""
    found: F32 = np.ldexp(np.float32(1), scales.astype(np.int32) - 128)
    return found


def _nearest(doubled: F32) -> Codes:
    """Codes of values that are divided by half the scale."""
    sizes = np.searchsorted(_BETWEEN, np.abs(doubled)).astype(np.uint8)
    return np.where(doubled < 0, sizes | 8, sizes).astype(np.uint8)
