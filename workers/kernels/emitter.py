"""Products and sums of rows in eight and four bits, as code for LLVM.

Sums of one group are exact, in 32 bits. Of the groups they are added as float32, in an order that depends on
the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from storage.lowbits import CENTRE, RUN, Grouped
from workers.kernels.instructions import (
    CONTRACT,
    FLOAT,
    I8,
    I16,
    I32,
    LANES,
    Instructions,
    Processor,
    every,
    long,
)

PAIR = 2 * RUN  # values that one step multiplies
ROWS = 4  # at once: more of the memory is under way than with one
_AT_ONCE = 8  # groups whose scales are widened together
_CACHE_LINE = 64  # bytes


class Emitter(Instructions):
    """Instructions for rows in one format. Rows are addresses, and `groups` how many a row has."""

    def __init__(self, builder: Any, grouped: Grouped, processor: Processor) -> None:
        super().__init__(builder, processor)
        self.grouped = grouped

    def tables(self, row: Any, groups: Any) -> tuple[Any, Any]:
        """Where a row of so many groups has its scales, and its minima (or what serves as those)."""
        b, step = self.builder, self.grouped.group * self.grouped.bits // 8
        scales = b.gep(row, [b.mul(groups, long(step))])
        return scales, b.gep(scales, [b.mul(groups, long(2))]) if self.grouped.minima else scales

    def dots(
        self, rows: Sequence[Any], following: Sequence[Any], x: tuple[Any, Any, Any], groups: Any
    ) -> Any:
        """Products of ROWS rows with one prepared vector, float32, while the following rows are asked for."""
        b = self.builder
        values, scales, sums = x
        tables = [self.tables(row, groups) for row in rows]
        zero = every(ir.VectorType(FLOAT, LANES), 0.0)
        totals = [self.variable(zero) for _ in rows]
        few = max(1, PAIR // self.grouped.group)  # groups of one step's values

        def block(first: Any, count: int) -> None:
            own = self.load(scales, b.mul(first, long(4)), ir.VectorType(FLOAT, count))
            place = b.mul(first, long(2))
            factors = [b.fmul(self.halves(table, place, count), own) for table, _ in tables]
            now = [b.load(total) for total in totals]
            if count == _AT_ONCE:
                self._fetch(following, first, count)
            if self.grouped.bits == 4:
                about = self.load(sums, b.mul(first, long(4)), ir.VectorType(FLOAT, count))
                for number, (_, minima) in enumerate(tables):
                    added = b.fmul(self.halves(minima, place, count), about)
                    now[number] = b.fadd(now[number], self._filled(added), flags=CONTRACT)
            for start in range(0, count * self.grouped.group, PAIR):
                which = [(start + half * RUN) // self.grouped.group for half in (0, 1)]
                at = b.add(b.mul(first, long(self.grouped.group)), long(start))
                vector = self._values(values, at)
                for number, row in enumerate(rows):
                    whole = self._step(row, at, vector)
                    for lanes, part in zip(self._lanes(which), whole, strict=True):
                        factor = self.pick(factors[number], lanes)
                        floats = b.sitofp(part, ir.VectorType(FLOAT, LANES))
                        now[number] = self.fma(now[number], floats, factor)
            for total, value in zip(totals, now, strict=True):
                b.store(value, total)

        whole = b.mul(b.sdiv(groups, long(_AT_ONCE)), long(_AT_ONCE))
        self.loop(long(0), whole, _AT_ONCE, lambda first: block(first, _AT_ONCE))
        self.loop(whole, groups, few, lambda first: block(first, few))
        return [self.sum(b.load(total)) for total in totals]

    def _fetch(self, following: Sequence[Any], first: Any, count: int) -> None:
        """As many bytes of the following rows as `count` groups have, with their share of scales."""
        offset = self.builder.mul(first, long(self.grouped.bytes))
        for row in following:
            for line in range(0, count * self.grouped.bytes, _CACHE_LINE):
                self.fetch(row, self.builder.add(offset, long(line)))

    def _filled(self, value: Any) -> Any:
        """Zeros behind a vector of fewer than LANES."""
        count = value.type.count
        if count == LANES:
            return value
        mask = ir.Constant(ir.VectorType(I32, LANES), [min(lane, count) for lane in range(LANES)])
        return self.builder.shuffle_vector(value, every(value.type, 0.0), mask)

    def _lanes(self, which: Sequence[int]) -> list[list[int]]:
        """Of the groups' factors, those for the lanes of each sum that `_step` makes."""
        if self.grouped.bits == 4:
            return [[which[0]] * 4 + [which[1]] * 4]
        return [[which[0]] * LANES, [which[1]] * LANES] if which[0] != which[1] else [[which[0]] * LANES]

    def _values(self, values: Any, at: Any) -> list[Any]:
        """Of the prepared vector, what PAIR values take from value `at` on."""
        kind = ir.VectorType(I16, RUN // 2) if self.grouped.bits == 8 else ir.VectorType(I8, RUN)
        offset = self.builder.mul(at, long(2))
        return [self.load(values, self.builder.add(offset, long(32 * part)), kind) for part in range(4)]

    def _step(self, row: Any, at: Any, vector: Sequence[Any]) -> list[Any]:
        """Whole sums of PAIR products: of eight bits one a group, of four one whose halves are the runs'."""
        b = self.builder
        if self.grouped.bits == 8:
            sums = []
            for run in (0, 1):
                codes = self.load(row, b.add(at, long(run * RUN)), ir.VectorType(I8, RUN))
                halves = (self.pick(codes, range(start, start + 16)) for start in (0, 16))
                wide = [b.sext(half, ir.VectorType(I16, 16)) for half in halves]
                parts = (
                    self.products(*pair) for pair in zip(wide, vector[2 * run : 2 * run + 2], strict=True)
                )
                sums.append(b.add(*parts))
            return sums if self.grouped.group == RUN else [b.add(*sums)]
        codes = self.load(row, b.sdiv(at, long(2)), ir.VectorType(I8, RUN))
        low, high = self.nibbles(codes)
        return [self.bytes_products((low, high), vector[:2], vector[2:])]

    def run(self, row: Any, at: Any) -> Any:
        """The codes of RUN values from value `at` on, as float32."""
        b, words, floats = self.builder, ir.VectorType(I32, RUN), ir.VectorType(FLOAT, RUN)
        if self.grouped.bits == 8:
            return b.sitofp(b.sext(self.load(row, at, ir.VectorType(I8, RUN)), words), floats)
        low, high = self.nibbles(self.load(row, b.sdiv(at, long(2)), ir.VectorType(I8, RUN // 2)))
        both = b.shuffle_vector(low, high, ir.Constant(words, list(range(RUN))))
        return b.sitofp(b.zext(both, words), floats)

    def scale(self, table: Any, at: Any) -> Any:
        """The number of the group that holds value `at`."""
        b = self.builder
        offset = b.mul(b.sdiv(at, long(self.grouped.group)), long(2))
        return b.extract_element(self.halves(table, offset, 1), ir.Constant(I32, 0))

    def add(self, y: Any, rows: Sequence[Any], a: Sequence[Any], column: Any, stop: Any, groups: Any) -> None:
        """y[j - column] += a[0] · rows[0][j], then a[1] · rows[1][j] and so on, for j in column … stop."""
        b = self.builder
        tables = [self.tables(row, groups) for row in rows]

        def block(at: Any) -> None:
            offset = b.mul(b.sub(at, column), long(4))
            total = self.load(y, offset, ir.VectorType(FLOAT, RUN))
            for row, factor, (scales, minima) in zip(rows, a, tables, strict=True):
                weight = b.fmul(factor, self.scale(scales, at))
                if self.grouped.bits == 4:
                    if self.grouped.minima:
                        shift = b.fmul(factor, self.scale(minima, at))
                    else:
                        shift = b.fmul(weight, ir.Constant(FLOAT, -float(CENTRE)))
                    total = b.fadd(total, self.spread(shift))
                total = self.fma(total, self.run(row, at), self.spread(weight))
            self.store(total, y, offset)

        self.loop(column, stop, RUN, block)

    def widen(self, out: Any, row: Any, column: Any, stop: Any, groups: Any) -> None:
        """out[j - column] = row[j], for j in column … stop."""
        b = self.builder
        scales, minima = self.tables(row, groups)

        def block(at: Any) -> None:
            codes = self.run(row, at)
            if self.grouped.bits == 4 and not self.grouped.minima:
                codes = b.fsub(codes, every(codes.type, float(CENTRE)))
            values = b.fmul(codes, self.spread(self.scale(scales, at)))
            if self.grouped.minima:
                values = b.fadd(values, self.spread(self.scale(minima, at)))
            self.store(values, out, b.mul(b.sub(at, column), long(4)))

        self.loop(column, stop, RUN, block)
