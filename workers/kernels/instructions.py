"""Code for LLVM that numba's own types cannot say: products of whole numbers in eight and four bits.

A dot product of stored whole numbers with float32 values would spend its time on making floats of codes. So
the values become whole numbers, too, of 16 bits with a scale for each group (`prepare.py`), and the
processor's own instruction multiplies and adds pairs of them: `vpmaddwd` where the codes have eight bits,
`vpdpbusd` or `vpmaddubsw` where they have four and the values come as two planes of eight bits.

Sums of one group are exact, in 32 bits. Of the groups they are added as float32, in an order that depends on
the row alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir

from storage.lowbits import CENTRE, RUN, Grouped

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
LANES = 8  # float32 sums of one row; a group's codes are added in eight lanes
PAIR = 2 * RUN  # values that one step multiplies
ROWS = 4  # at once: more of the memory is under way than with one
_AT_ONCE = 8  # groups whose scales are widened together
_CACHE_LINE = 64  # bytes
_CONTRACT = ("contract",)


@dataclass(frozen=True)
class Processor:
    """Which of the instructions there are."""

    madd: bool  # vpmaddwd and vpmaddubsw on 32 bytes
    dot: bool  # vpdpbusd
    half: bool  # float16 → float32

    @classmethod
    def here(cls) -> Processor:
        """Of this machine. Others compute the same by what every processor has."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return cls(False, False, platform.machine() in ("aarch64", "arm64"))
        features = binding.get_host_cpu_features()
        vnni = features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl"))
        return cls(bool(features.get("avx2")), bool(vnni), bool(features.get("f16c")))


class Emitter:
    """Instructions for rows in one format, put where `builder` stands."""

    def __init__(self, builder: Any, grouped: Grouped, processor: Processor) -> None:
        self.builder = builder
        self.grouped = grouped
        self.processor = processor
        self.run_bytes = RUN * grouped.bits // 8

    # -- what a processor has -------------------------------------------------------------------

    def load(self, base: Any, offset: Any, kind: Any) -> Any:
        """What lies `offset` bytes behind `base`, wherever that is."""
        found = self.builder.load(self.builder.bitcast(self.builder.gep(base, [offset]), kind.as_pointer()))
        found.align = 1
        return found

    def store(self, value: Any, base: Any, offset: Any) -> None:
        place = self.builder.bitcast(self.builder.gep(base, [offset]), value.type.as_pointer())
        self.builder.store(value, place).align = 1

    def variable(self, value: Any) -> Any:
        """A place that starts with `value`."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(value.type)
        self.builder.store(value, place)
        return place

    def loop(self, start: Any, stop: Any, step: int, body: Callable[[Any], None]) -> None:
        """for i in range(start, stop, step): body(i)"""
        b, counter = self.builder, self.variable(start)
        head, inside, behind = (b.append_basic_block(name) for name in ("head", "body", "behind"))
        b.branch(head)
        b.position_at_end(head)
        index = b.load(counter)
        b.cbranch(b.icmp_signed("<", index, stop), inside, behind)
        b.position_at_end(inside)
        body(index)
        b.store(b.add(index, long(step)), counter)
        b.branch(head)
        b.position_at_end(behind)

    def pick(self, value: Any, lanes: Sequence[int]) -> Any:
        """Some lanes of a vector."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)

    def fetch(self, base: Any, offset: Any) -> None:
        """Ask for the cache line of a byte, without waiting for it."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        prefetch = self.builder.module.declare_intrinsic("llvm.prefetch", [I8.as_pointer()], kind)
        read, near, data_cache = (ir.Constant(I32, number) for number in (0, 3, 1))
        self.builder.call(prefetch, [self.builder.gep(base, [offset]), read, near, data_cache])

    def fma(self, total: Any, left: Any, right: Any) -> Any:
        product = self.builder.fmul(left, right, flags=_CONTRACT)
        return self.builder.fadd(total, product, flags=_CONTRACT)

    def halves(self, base: Any, offset: Any, count: int) -> Any:
        """`count` float16 numbers as float32."""
        b, floats = self.builder, ir.VectorType(FLOAT, count)
        if self.processor.half:
            return b.fpext(self.load(base, offset, ir.VectorType(HALF, count)), floats)
        words = ir.VectorType(I32, count)  # exact for every finite number: the product moves the exponents
        wide = b.zext(self.load(base, offset, ir.VectorType(I16, count)), words)
        size = b.shl(b.and_(wide, every(words, 0x7FFF)), every(words, 13))
        sign = b.shl(b.and_(wide, every(words, 0x8000)), every(words, 16))
        return b.fmul(b.bitcast(b.or_(size, sign), floats), every(floats, 2.0**112))

    def products(self, left: Any, right: Any) -> Any:
        """Sums of neighbours' products: 16 pairs of int16 as 8 int32."""
        b, wide = self.builder, ir.VectorType(I32, 2 * LANES)
        if self.processor.madd:
            return self._instruction("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, LANES), left, right)
        each = b.mul(b.sext(left, wide), b.sext(right, wide))
        return b.add(self.pick(each, range(0, 16, 2)), self.pick(each, range(1, 16, 2)))

    def bytes_products(self, codes: Sequence[Any], high: Sequence[Any], low: Sequence[Any]) -> Any:
        """Σ codes · (128 · high + low) over neighbours: vectors of 32 bytes, codes 0 … 15, as 8 int32."""
        b, words = self.builder, ir.VectorType(I32, LANES)
        if self.processor.dot:
            total = every(words, 0)
            for some, plane in zip(codes, high, strict=True):
                total = self._dot(total, some, plane)
            total = b.shl(total, every(words, 7))
            for some, plane in zip(codes, low, strict=True):
                total = self._dot(total, some, plane)
            return total
        sums = []
        for planes in (high, low):  # each sum of four products stays within 16 bits
            parts = [self._pairs(some, plane) for some, plane in zip(codes, planes, strict=True)]
            sums.append(b.add(*parts))
        shorts = sums[0].type
        return b.add(self.products(sums[0], every(shorts, 128)), self.products(sums[1], every(shorts, 1)))

    def _pairs(self, codes: Any, plane: Any) -> Any:
        """Sums of neighbours' products: 32 pairs of bytes as 16 int16."""
        b, wide = self.builder, ir.VectorType(I16, RUN)
        if self.processor.madd:
            return self._instruction("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), codes, plane)
        each = b.mul(b.zext(codes, wide), b.sext(plane, wide))
        return b.add(self.pick(each, range(0, 32, 2)), self.pick(each, range(1, 32, 2)))

    def _dot(self, total: Any, codes: Any, plane: Any) -> Any:
        name = "llvm.x86.avx512.vpdpbusd.256"
        if binding.llvm_version_info < (22,):  # which took the bytes for words
            codes, plane = (self.builder.bitcast(one, total.type) for one in (codes, plane))
        return self._instruction(name, total.type, total, codes, plane)

    def _instruction(self, name: str, returns: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(returns, [one.type for one in arguments])
        return self.builder.call(self.builder.module.declare_intrinsic(name, (), kind), arguments)

    # -- what a format asks for -----------------------------------------------------------------

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
                    now[number] = b.fadd(now[number], self._filled(added), flags=_CONTRACT)
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
        return [self._sum(b.load(total)) for total in totals]

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
        low, high = self._nibbles(codes)
        return [self.bytes_products((low, high), vector[:2], vector[2:])]

    def _nibbles(self, codes: Any) -> tuple[Any, Any]:
        """The low and the high halves of bytes. Shifted as words, since no processor shifts bytes."""
        b, mask = self.builder, every(codes.type, 15)
        shorts = ir.VectorType(I16, codes.type.count // 2)
        shifted = b.lshr(b.bitcast(codes, shorts), every(shorts, 4))
        return b.and_(codes, mask), b.and_(b.bitcast(shifted, codes.type), mask)

    def _sum(self, value: Any) -> Any:
        b = self.builder
        while value.type.count > 1:
            half = value.type.count // 2
            low, high = self.pick(value, range(half)), self.pick(value, range(half, 2 * half))
            if half == 1:
                zero = ir.Constant(I32, 0)
                return b.fadd(b.extract_element(low, zero), b.extract_element(high, zero))
            value = b.fadd(low, high)
        raise AssertionError("a vector of one")

    def run(self, row: Any, at: Any) -> Any:
        """The codes of RUN values from value `at` on, as float32."""
        b, words, floats = self.builder, ir.VectorType(I32, RUN), ir.VectorType(FLOAT, RUN)
        if self.grouped.bits == 8:
            return b.sitofp(b.sext(self.load(row, at, ir.VectorType(I8, RUN)), words), floats)
        low, high = self._nibbles(self.load(row, b.sdiv(at, long(2)), ir.VectorType(I8, RUN // 2)))
        both = b.shuffle_vector(low, high, ir.Constant(words, list(range(RUN))))
        return b.sitofp(b.zext(both, words), floats)

    def scale(self, table: Any, at: Any) -> Any:
        """The number of the group that holds value `at`."""
        b = self.builder
        offset = b.mul(b.sdiv(at, long(self.grouped.group)), long(2))
        return b.extract_element(self.halves(table, offset, 1), ir.Constant(I32, 0))

    def spread(self, value: Any) -> Any:
        """One float32 in RUN lanes."""
        one = self.builder.insert_element(
            ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined), value, ir.Constant(I32, 0)
        )
        return self.pick(one, [0] * RUN)

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


def long(value: int) -> Any:
    return ir.Constant(I64, value)


def every(kind: Any, value: float) -> Any:
    """A vector of this type, with the same number everywhere."""
    return ir.Constant(kind, [value] * kind.count)
