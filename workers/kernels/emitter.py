"""Products and sums of rows in eight and four bits, as code for LLVM.

Sums of one group are exact, in 32 bits. Of the groups they are added as float32, in an order that depends on
the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
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
    every,
    long,
)
from workers.kernels.processor import Processor

PAIR = 2 * RUN  # values: rows are whole pairs of runs
ROWS = 4  # at once: more of the memory is under way than with one
_BLOCK = 512  # values whose scales are widened together
_CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Vector:
    """Where a prepared vector lies (`prepare.py`), from some group on; addresses, and `step` in bytes."""

    values: Any  # planes of whole numbers, `step` apart; or float32
    step: Any
    scales: Any  # of whole numbers
    sums: Any  # of groups, for four bits


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

    def fetch_lines(self, rows: Sequence[Any], start: Any, first: int, stop: int) -> None:
        """Ask for the cache lines of rows that begin `first` to `stop` bytes behind `start`."""
        for line in range(-(-first // _CACHE_LINE) * _CACHE_LINE, stop, _CACHE_LINE):
            for row in rows:
                self.fetch(row, self.builder.add(start, long(line)))

    def filled(self, value: Any) -> Any:
        """Zeros behind a vector of fewer than LANES."""
        count = value.type.count
        if count == LANES:
            return value
        mask = ir.Constant(ir.VectorType(I32, LANES), [min(lane, count) for lane in range(LANES)])
        return self.builder.shuffle_vector(value, every(value.type, 0), mask)

    def floats(self, row: Any, at: Any) -> list[Any]:
        """The codes of RUN values from value `at` on, as float32."""
        b, words = self.builder, ir.VectorType(I32, LANES)
        if self.grouped.bits == 8:
            places = (b.add(at, long(start)) for start in range(0, RUN, LANES))
            wide = [b.sext(self.load(row, place, ir.VectorType(I8, LANES)), words) for place in places]
        else:
            both = b.zext(self.load(row, b.lshr(at, long(1)), ir.VectorType(I8, LANES)), words)
            wide = [b.and_(both, every(words, 15)), b.lshr(both, every(words, 4))]
        return [b.sitofp(some, ir.VectorType(FLOAT, LANES)) for some in wide]


class Products(Emitter):
    """Products of rows with a vector of float32 as it is."""

    def dots(self, rows: Sequence[Any], following: Sequence[Any], x: Vector, groups: Any) -> list[Any]:
        """Of ROWS rows, float32, while the following rows are asked for.

        Rows of four bits that lie one behind the other are taken one after the other, and others all at once:
        a core fetches one long stream faster than four, but four short ones faster than one. Two threads got
        25 GB/s of `q4` instead of 18, where a plain read got 35; of `q8` 28 either way. The results are the
        same bits.
        """
        if self.grouped.bits == 8:
            return self._dots(rows, following, x, groups)
        b = self.builder
        size = b.mul(groups, long(self.grouped.bytes))
        addresses = [b.ptrtoint(row, size.type) for row in rows]
        follow = [b.icmp_signed("==", b.sub(second, first), size) for first, second in pairwise(addresses)]
        found = [self.variable(ir.Constant(FLOAT, 0)) for _ in rows]
        with b.if_else(reduce(b.and_, follow)) as (neighbours, scattered):
            with neighbours:  # not as a loop over them: that loses a tenth
                for place, row, later in zip(found, rows, following, strict=True):
                    (result,) = self._dots([row], [later], x, groups)
                    b.store(result, place)
            with scattered:
                for place, result in zip(found, self._dots(rows, following, x, groups), strict=True):
                    b.store(result, place)
        return [b.load(place) for place in found]

    def _dots(self, rows: Sequence[Any], following: Sequence[Any], x: Vector, groups: Any) -> list[Any]:
        """Of all these rows at once."""
        b, group = self.builder, self.grouped.group
        tables = [self.tables(row, groups) for row in rows]
        zero = every(ir.VectorType(FLOAT, LANES), 0.0)
        totals = [self.variable(zero) for _ in rows]

        def block(first: Any, count: int) -> None:
            place, wide = b.mul(first, long(2)), b.mul(first, long(4))
            factors = self._factors([self.halves(table, place, count) for table, _ in tables], x, wide)
            now = [b.load(total) for total in totals]
            if self.grouped.bits == 4:
                about = self.load(x.sums, wide, ir.VectorType(FLOAT, count))
                for number, (_, minima) in enumerate(tables):
                    added = b.fmul(self.halves(minima, place, count), about)
                    now[number] = b.fadd(now[number], self.filled(added), flags=CONTRACT)
            values, size = count * group, count * self.grouped.bytes
            step = min(self.step, values)
            start = b.mul(first, long(self.grouped.bytes))
            for done in range(0, values, step):
                self.fetch_lines(following, start, size * done // values, size * (done + step) // values)
                at = b.add(b.mul(first, long(group)), long(done))
                vector = self._vector(x, at, step)
                for number, row in enumerate(rows):
                    for part, which in self._sums(row, at, vector):
                        lanes = [(done + value) // group for value in which]
                        factor = self.filled(self.pick(factors[number], lanes))
                        now[number] = self.fma(now[number], self.filled(part), factor)
            for total, value in zip(totals, now, strict=True):
                b.store(value, total)

        # Of eight bits the sums are the same however many scales are widened together: half as many fit into
        # half as long registers.
        narrow = self.grouped.bits == 8 and not self.processor.wide
        start, most, least = long(0), _BLOCK // 2 if narrow else _BLOCK, max(PAIR, group)
        for values in (most, 2 * PAIR, PAIR):  # ever shorter blocks for what is left of a row
            if values >= least:
                count = values // group
                stop = b.mul(b.sdiv(groups, long(count)), long(count))
                self.loop(start, stop, count, partial(block, count=count))
                start = stop
        return [self.sum(b.load(total)) for total in totals]

    step = RUN

    def _factors(self, scales: list[Any], x: Vector, place: Any) -> list[Any]:
        """What groups' sums are multiplied with."""
        return scales

    def _vector(self, x: Vector, at: Any, count: int) -> Any:
        """Of the prepared vector, what `count` values take from value `at` on."""
        places = [self.builder.mul(self.builder.add(at, long(start)), long(4)) for start in (0, LANES)]
        return [self.load(x.values, place, ir.VectorType(FLOAT, LANES)) for place in places]

    def _sums(self, row: Any, at: Any, vector: Any) -> list[tuple[Any, list[int]]]:
        """Sums of products as float32, and of each lane the distance of one of its values from `at`."""
        low, high = self.floats(row, at)
        product = self.builder.fmul(low, vector[0], flags=CONTRACT)
        return [(self.fma(product, high, vector[1]), [0] * LANES)]


class WholeProducts(Products):
    """Products of rows with a vector of whole numbers. `prepare.py` has its planes."""

    def __init__(self, builder: Any, grouped: Grouped, processor: Processor) -> None:
        super().__init__(builder, grouped, processor)
        self.step = PAIR if grouped.bits == 8 else 2 * PAIR

    def _factors(self, scales: list[Any], x: Vector, place: Any) -> list[Any]:
        own = self.load(x.scales, place, scales[0].type)
        if self.grouped.bits == 8 and not self.processor.dot:
            own = self.builder.fmul(own, every(own.type, 1 / 256))
        return [self.builder.fmul(some, own) for some in scales]

    def _vector(self, x: Vector, at: Any, count: int) -> Any:
        b, eight = self.builder, self.grouped.bits == 8
        size = count * self.grouped.bits // 8
        start = at if eight else b.lshr(at, long(1))
        if eight:
            shorts, words = ir.VectorType(I16, size // 2), ir.VectorType(I32, size // 4)
            kinds = [ir.VectorType(I8, size)] * 2 + [words] if self.processor.dot else [shorts] * 2
        else:
            kinds = [ir.VectorType(I8, size)] * 4
        return [
            self.load(x.values, b.add(b.mul(x.step, long(plane)), start), kind)
            for plane, kind in enumerate(kinds)
        ]

    def _sums(self, row: Any, at: Any, vector: Any) -> list[tuple[Any, list[int]]]:
        b = self.builder
        if self.grouped.bits == 8:
            whole = self._of_bytes(self.load(row, at, ir.VectorType(I8, PAIR)), vector)
        else:
            count = vector[0].type.count
            codes = self.nibbles(self.load(row, b.lshr(at, long(1)), ir.VectorType(I8, count)))
            whole = self._of_nibbles(codes, vector[:2], vector[2:])
        found = b.sitofp(whole, ir.VectorType(FLOAT, whole.type.count))
        each = 32 // self.grouped.bits  # values that a lane adds up
        return [(found, [each * lane for lane in range(whole.type.count)])]

    def _of_bytes(self, codes: Any, vector: Sequence[Any]) -> Any:
        """Σ of four neighbours' codes · whole numbers, of PAIR values; 256 times that without vpdpbusd."""
        b = self.builder
        if self.processor.dot:
            high, low, about = vector
            shifted = b.xor(codes, every(codes.type, 0x80))  # 128 more, without a sign
            total = b.shl(self.dot(about, shifted, high), every(about.type, 7))
            return self.dot(total, shifted, low)
        shorts = ir.VectorType(I16, PAIR // 2)
        both = b.bitcast(codes, shorts)
        # 256 times each code, so that no second shift is needed: four products of the largest stay below 2³¹.
        even, odd = b.shl(both, every(shorts, 8)), b.and_(both, every(shorts, 0xFF00))
        return b.add(self.products(even, vector[0]), self.products(odd, vector[1]))

    def _of_nibbles(self, codes: Sequence[Any], high: Sequence[Any], low: Sequence[Any]) -> Any:
        """Σ codes · (128 · high + low) over four neighbours of either half of the bytes: codes 0 … 15."""
        b = self.builder
        if self.processor.dot:
            total = every(ir.VectorType(I32, codes[0].type.count // 4), 0)
            for some, plane in zip(codes, high, strict=True):
                total = self.dot(total, some, plane)
            total = b.shl(total, every(total.type, 7))
            for some, plane in zip(codes, low, strict=True):
                total = self.dot(total, some, plane)
            return total
        sums = []
        for planes in (high, low):  # each sum of four products stays within 16 bits
            parts = [self.pairs(some, plane) for some, plane in zip(codes, planes, strict=True)]
            sums.append(b.add(*parts))
        shorts = sums[0].type
        return b.add(self.products(sums[0], every(shorts, 128)), self.products(sums[1], every(shorts, 1)))


class Sums(Emitter):
    """Sums of rows, each times its own number, and rows as float32."""

    def add(
        self,
        y: Any,
        rows: Sequence[Any],
        following: Sequence[Any],
        a: Sequence[Any],
        column: Any,
        stop: Any,
        groups: Any,
    ) -> None:
        """y[j - column] += a[0] · rows[0][j], then a[1] · rows[1][j] and so on, for j in column … stop.

        Meanwhile the same part of the following rows is asked for.
        """
        b, group, bits = self.builder, self.grouped.group, self.grouped.bits
        tables = [self.tables(row, groups) for row in rows]
        later = [self.tables(row, groups) for row in following]
        many = _BLOCK // group
        # Through memory: each number is then spread over all lanes as it is loaded.
        weights, shifts = (self._scratch(len(rows) * many) for _ in (0, 1))
        step = max(PAIR, group)
        first, last = b.sdiv(column, long(group)), b.sdiv(stop, long(group))

        def weigh(at: Any, count: int, place: Any) -> None:
            """Numbers of `count` groups from group `at` on."""
            offset, kind = b.mul(at, long(2)), ir.VectorType(FLOAT, count)
            for table in {id(table): table for two in later for table in two}.values():
                self.fetch(table, offset)
            for number, (factor, (scales, minima)) in enumerate(zip(a, tables, strict=True)):
                factors = self.pick(self.spread(factor), [0] * count)
                weight = b.fmul(factors, self.halves(scales, offset, count))
                where = b.add(b.mul(place, long(4)), long(4 * number * many))
                self.store(weight, weights, where)
                if bits == 4:
                    if self.grouped.minima:
                        shift = b.fmul(factors, self.halves(minima, offset, count))
                    else:
                        shift = b.fmul(weight, every(kind, -float(CENTRE)))
                    self.store(shift, shifts, where)

        def part(start: Any, end: Any) -> None:
            """Groups start … end."""

            def pair(at: Any) -> None:
                value = b.mul(at, long(group))
                self.fetch_lines(following, b.lshr(b.mul(value, long(bits)), long(3)), 0, step * bits // 8)
                place = b.mul(b.sub(at, start), long(4))
                for run in range(0, step, RUN):
                    here = b.add(value, long(run))
                    offset = b.mul(b.sub(here, column), long(4))
                    kind = ir.VectorType(FLOAT, LANES)
                    totals = [
                        self.load(y, b.add(offset, long(4 * lane)), kind) for lane in range(0, RUN, LANES)
                    ]
                    for number, row in enumerate(rows):
                        which = b.add(place, long(4 * (number * many + run // group)))
                        weight = self.spread(self.load(weights, which, FLOAT))
                        codes = self.floats(row, here)
                        if bits == 4:
                            shift = self.spread(self.load(shifts, which, FLOAT))
                            totals = [b.fadd(total, shift) for total in totals]
                        totals = [
                            self.fma(total, some, weight) for total, some in zip(totals, codes, strict=True)
                        ]
                    for lane, total in enumerate(totals):
                        self.store(total, y, b.add(offset, long(4 * LANES * lane)))

            self.loop(start, end, step // group, pair)

        def block(at: Any) -> None:
            weigh(at, many, long(0))
            part(at, b.add(at, long(many)))

        def rest(at: Any) -> None:
            weigh(at, step // group, long(0))
            part(at, b.add(at, long(step // group)))

        whole = b.add(first, b.mul(b.sdiv(b.sub(last, first), long(many)), long(many)))
        self.loop(first, whole, many, block)
        self.loop(whole, last, step // group, rest)

    def _scratch(self, count: int) -> Any:
        with self.builder.goto_entry_block():
            place = self.builder.alloca(ir.ArrayType(FLOAT, count))
        place.align = 64
        return self.builder.bitcast(place, I8.as_pointer())

    def widen(self, out: Any, row: Any, column: Any, stop: Any, groups: Any) -> None:
        """out[j - column] = row[j], for j in column … stop."""
        b = self.builder
        scales, minima = self.tables(row, groups)

        def block(at: Any) -> None:
            place = b.mul(b.sub(at, column), long(4))
            scale = self.spread(self._number(scales, at))
            parts = self.floats(row, at)
            if self.grouped.minima:
                minimum = self.spread(self._number(minima, at))
                found = [b.fadd(b.fmul(codes, scale), minimum) for codes in parts]
            else:
                if self.grouped.bits == 4:
                    parts = [b.fsub(codes, every(codes.type, float(CENTRE))) for codes in parts]
                found = [b.fmul(codes, scale) for codes in parts]
            for number, some in enumerate(found):
                self.store(some, out, b.add(place, long(4 * LANES * number)))

        self.loop(column, stop, RUN, block)

    def _number(self, table: Any, at: Any) -> Any:
        """Of the group that holds value `at`."""
        b = self.builder
        offset = b.mul(b.sdiv(at, long(self.grouped.group)), long(2))
        return b.extract_element(self.halves(table, offset, 1), ir.Constant(I32, 0))
