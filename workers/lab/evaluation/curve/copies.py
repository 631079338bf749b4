"""Low-bit copies of rows, by the names of their formats.

The store's own formats are rounded by their codecs. Fewer bits are measured here as points of a curve: `q3`
and `q2` with groups as `q4` has them, of 32 values or as many as stand behind a `g`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from storage import nearest
from storage.architecture import Ffn
from storage.codecs import CODECS, F32
from storage.convert.recipe import unit_width
from storage.errors import UsageError

_FEW = re.compile(r"q([23])(?:g(\d{2,3}))?")
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Copy:
    """A format that rows are rounded to."""

    name: str
    bits: int
    group: int  # values that share a scale
    tables: int  # float16 numbers for a group

    @classmethod
    def of(cls, name: str) -> Copy:
        """Raises UsageError for no format."""
        codec = CODECS.get(name)
        if codec is not None and codec.grouped is not None:
            tables = 2 if getattr(codec.grouped, "minima", False) else 1
            bits = 8 if name.startswith("q8") else 4
            return cls(name, bits, codec.block, tables)
        few = _FEW.fullmatch(name)
        if few is None:
            known = ", ".join(one for one, codec in CODECS.items() if codec.grouped is not None)
            raise UsageError(f"unknown low-bit format {name!r}; known: {known}, q3, q2 (also as q3g64)")
        return cls(name, int(few[1]), int(few[2] or 32), 2)

    def fits(self, width: int) -> bool:
        """Whether rows of `width` values can be rounded."""
        return CODECS[self.name].fits(width) if self.name in CODECS else width % self.group == 0

    def bytes(self, values: int) -> int:
        """Of so many values, in whole groups."""
        if self.name in CODECS:
            return CODECS[self.name].size(values)
        return values * self.bits // 8 + values // self.group * 2 * self.tables

    def rounded(self, rows: F32) -> F32:
        """What rows [n, width] read as. Raises UsageError for a width that has no whole groups."""
        if not self.fits(rows.shape[1]):
            raise UsageError(f"rows of {rows.shape[1]} values are no whole groups of {self.name}")
        if self.name in CODECS:
            codec = CODECS[self.name]
            return codec.widen(codec.narrow(rows))
        found = np.empty_like(rows)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            groups = np.ascontiguousarray(some).reshape(len(some), -1, self.group)
            codes, scales, minima = nearest.between(groups, self.bits)
            found[start : start + _ROWS_AT_ONCE] = (codes * scales[..., None] + minima[..., None]).reshape(
                some.shape
            )
        return found

    def rounded_down(self, ffn: Ffn, down: F32) -> F32:
        """Down rows [neurons, d_model], rounded as a store of few bits holds them.

        There they lie by output, in groups along the neurons of a unit, wherever units have several.
        """
        width = unit_width(ffn, low=True)
        if width == 1 or not self.fits(width):
            return self.rounded(down)
        units = down.reshape(-1, width, down.shape[1]).transpose(0, 2, 1)  # [units, d_model, width]
        rounded = self.rounded(np.ascontiguousarray(units).reshape(-1, width)).reshape(units.shape)
        return np.ascontiguousarray(rounded.transpose(0, 2, 1)).reshape(down.shape)
