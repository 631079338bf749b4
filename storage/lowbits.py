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
_ROWS_AT_ONCE = 1 << 20  # values that are rounded together: temporaries stay small
# Tried as the scale of a group, as shares of what its largest value asks for.
_SHARES = tuple(np.linspace(0.8, 1.1, 13, dtype=np.float32))


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
        codes, (scales, *minima) = self.split(stored.reshape(-1, stored.shape[-1]))
        if self.bits == 4 and not self.minima:
            codes = codes - np.int16(CENTRE)
        values = codes.astype(np.float32) * scales[..., None]
        if minima:
            values += minima[0][..., None]
        return values.reshape(*stored.shape[:-1], -1)

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
        groups = rows.reshape(rows.shape[0], -1, self.group)
        return self.join(*(self._between(groups) if self.minima else self._about_zero(groups)))

    def _about_zero(self, x: F32) -> tuple[npt.NDArray[np.int16], list[npt.NDArray[np.float16]]]:
        """Codes and scales of groups [rows, groups, group] in a format without minima."""
        largest = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)
        low, high, centre = (-127, 127, 0) if self.bits == 8 else (-CENTRE, 7, CENTRE)
        # Four bits reach one further below zero: the largest value goes there, whatever its sign.
        whole = np.abs(largest) / np.float32(127) if self.bits == 8 else largest / np.float32(-CENTRE)
        least = np.full((*x.shape[:2], 1), np.inf, np.float32)
        best = np.zeros_like(least, np.float16)
        for share in _SHARES:
            scale = _half(whole * share)
            error = np.square(x - scale * _codes(x, scale, low, high)).sum(axis=2, keepdims=True)
            better = error < least
            best, least = np.where(better, scale.astype(np.float16), best), np.where(better, error, least)
        codes = _codes(x, best.astype(np.float32), low, high).astype(np.int16) + np.int16(centre)
        return codes, [best[..., 0]]

    def _between(self, x: F32) -> tuple[npt.NDArray[np.int16], list[npt.NDArray[np.float16]]]:
        """The same with minima: the best of several ranges, each refined by the line of least squares."""
        low, high = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
        top = np.float32(2**self.bits - 1)
        least = np.full((*x.shape[:2], 1), np.inf, np.float32)
        best, base = np.zeros_like(least, np.float16), np.zeros_like(least, np.float16)
        for share in _SHARES:
            trim = (high - low) * (1 - share) / 2
            plain = _half((high - low) * share / top), _half(low + trim)
            refined = _line(x, _codes(x - plain[1], plain[0], 0, int(top)), *plain)
            for scale, minimum in (plain, refined):
                error = np.square(x - minimum - scale * _codes(x - minimum, scale, 0, int(top)))
                error = error.sum(axis=2, keepdims=True)
                better = error < least
                best = np.where(better, scale.astype(np.float16), best)
                base = np.where(better, minimum.astype(np.float16), base)
                least = np.where(better, error, least)
        codes = _codes(x - base.astype(np.float32), best.astype(np.float32), 0, int(top)).astype(np.int16)
        return codes, [best[..., 0], base[..., 0]]


def _half(values: F32) -> F32:
    """As float16 has them; what is beyond becomes its largest."""
    return np.clip(values, -65_504, 65_504).astype(np.float16).astype(np.float32)


def _codes(x: F32, scale: F32, low: int, high: int) -> F32:
    """The nearest codes, as floats; those of a scale of zero are zero."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(x * inverse), low, high)


def _line(x: F32, codes: F32, scale: F32, minimum: F32) -> tuple[F32, F32]:
    """Scale and minimum with which these codes come nearest to x; the given ones where all codes are one."""
    count = np.float32(x.shape[2])
    mean, centre = x.sum(axis=2, keepdims=True) / count, codes.sum(axis=2, keepdims=True) / count
    apart = codes - centre
    spread = np.square(apart).sum(axis=2, keepdims=True)
    slope = np.divide((apart * x).sum(axis=2, keepdims=True), spread, out=scale.copy(), where=spread > 0)
    offset = np.where(spread > 0, mean - slope * centre, minimum)
    return _half(slope), _half(offset.astype(np.float32))
