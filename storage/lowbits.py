"""Eight and four bits: whole numbers with a scale for each group of values. FORMAT.md, "Codecs".

A row of `n` values is one run of bytes: the codes of all its groups, then the groups' scales, then, where
the format has them, their minima; scales and minima are float16. A value is `scale · code`, with minima
`scale · code + minimum`, and without them four bits mean `scale · (code - 8)`.

Eight bits are int8. Four bits are packed by runs of 32 values, in 16 bytes: byte `i` holds value `i` in its
low half and value `16 + i` in its high one. That is how GGUF packs a block, whose codes are taken over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

RUN = 32  # values that are packed together
CENTRE = 8  # the code of zero, in four bits without minima
_ROWS_AT_ONCE = 1 << 22  # values that are rounded together: temporaries stay small
_WIDENED_AT_ONCE = 1 << 18  # likewise; they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Grouped:
    """How values are written in few bits."""

    bits: int  # 8 or 4
    group: int  # values that share a scale, a multiple of RUN
    minima: bool = False

    @property
    def bytes(self) -> int:
        """Of one group, with its scale."""
        return self.group * self.bits // 8 + 2 * self.tables

    @property
    def tables(self) -> int:
        """Of float16 numbers behind the codes, one number for each group."""
        return 2 if self.minima else 1

    def fits(self, width: int) -> bool:
        """Whether rows of `width` values can be written: whole groups, and whole pairs of runs."""
        return width > 0 and width % max(self.group, 2 * RUN) == 0

    def join(self, codes: npt.NDArray[np.int16], tables: list[npt.NDArray[np.float16]]) -> Codes:
        """[rows, bytes] from codes [rows, groups, group], and scales and minima [rows, groups]."""
        rows, packed = codes.shape[0], codes.astype(np.uint8)  # int8's bytes are the same
        if self.bits == 4:
            halves = packed.reshape(rows, -1, 2, RUN // 2)
            packed = (halves[:, :, 0] | halves[:, :, 1] << 4).astype(np.uint8)
        behind = [np.ascontiguousarray(table, "<f2").view(np.uint8).reshape(rows, -1) for table in tables]
        return np.concatenate([packed.reshape(rows, -1), *behind], axis=1)

    def split(self, stored: Codes) -> tuple[npt.NDArray[np.int16], list[F32]]:
        """The inverse of `join`, of [rows, bytes]; scales and minima as float32."""
        rows, groups = stored.shape[0], stored.shape[1] // self.bytes
        end = groups * self.group * self.bits // 8
        packed = np.ascontiguousarray(stored[:, :end])
        if self.bits == 8:
            codes = packed.view(np.int8).astype(np.int16)
        else:
            runs = packed.reshape(rows, -1, RUN // 2)
            codes = np.concatenate([runs & 15, runs >> 4], axis=2).astype(np.int16)
        behind = np.ascontiguousarray(stored[:, end:]).view("<f2").reshape(rows, self.tables, groups)
        tables = [behind[:, number].astype(np.float32) for number in range(self.tables)]
        return codes.reshape(rows, groups, self.group), tables

    def cut(self, stored: Codes, count: int) -> Codes:
        """Rows cut into `count` parts of whole groups: [count, rows, bytes] from [rows, bytes]."""
        codes, tables = self.split(stored)
        parts = [
            self.join(some, [np.split(table.astype(np.float16), count, axis=1)[part] for table in tables])
            for part, some in enumerate(np.split(codes, count, axis=1))
        ]
        return np.stack(parts)

    def widen(self, stored: Codes) -> F32:
        """[..., values] from [..., bytes], each value rounded once, to float32."""
        rows = stored.reshape(-1, stored.shape[-1])
        values = np.empty((rows.shape[0], rows.shape[1] // self.bytes * self.group), np.float32)
        step = max(1, _WIDENED_AT_ONCE // max(1, values.shape[1]))
        for start in range(0, len(rows), step):
            values[start : start + step] = self._values(rows[start : start + step])
        return values.reshape(*stored.shape[:-1], -1)

    def _values(self, rows: Codes) -> F32:
        """[rows, values] from [rows, bytes]."""
        codes, (scales, *minima) = self.split(rows)
        if self.bits == 4 and not self.minima:
            codes = codes - np.int16(CENTRE)
        values = codes.astype(np.float32) * scales[..., None]
        if minima:
            values += minima[0][..., None]
        return values.reshape(len(rows), -1)

    def narrow(self, values: F32) -> Codes:
        """[..., bytes] from [..., values]: of several scales for a group the one of least squared error.

        Raises ValueError for values that are not finite.
        """
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite have no codes")
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
        step = max(1, _ROWS_AT_ONCE // max(1, values.shape[-1]))
        parts = [self._rounded(rows[start : start + step]) for start in range(0, len(rows), step)]
        size = values.shape[-1] // self.group * self.bytes
        return (
            np.concatenate(parts).reshape(*values.shape[:-1], size)
            if parts
            else np.empty((0, size), np.uint8)
        )

    def _rounded(self, rows: F32) -> Codes:
        from storage import nearest  # numba takes half a second to import, and few processes round

        groups = rows.reshape(rows.shape[0], -1, self.group)
        if self.minima:
            codes, *tables = nearest.between(groups, self.bits)
        else:
            codes, *tables = nearest.about_zero(groups, self.bits)
            codes += np.int16(CENTRE if self.bits == 4 else 0)
        return self.join(codes, [table.astype(np.float16) for table in tables])
