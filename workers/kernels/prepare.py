"""The vector that rows are multiplied with, in the form that their format takes.

Rows of floats take float32 as it is. Rows in few bits take whole numbers and a scale for each group of
values, `x ≈ scale · whole`, or float32 as it is, where activations are exact; those in four bits also the sum
of each group, which the format's minima are multiplied with.

Whole numbers are `128 · high + low`, ± 16,319, in planes of bytes, [planes, bytes of a row's codes]:

- eight bits: `high`, `low`, and for four neighbours at a time an int32, which takes back what codes without
  a sign have too much. Without vpdpbusd int16, first of even places, then of odd ones;
- four bits: `high` of the values that low halves of the codes' bytes hold, and of those that high halves do,
  then `low` likewise.

The rounding is an eighth of what float16 would round, near a group's largest value, and less than a
hundred-thousandth of a product's terms; docs/lowbits.md has what it does to a text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from storage.lowbits import CENTRE, Grouped
from workers.kernels.emitter import PAIR
from workers.kernels.grouped import Arguments, GroupsType, format_of, processor
from workers.kernels.instructions import FLOAT, I8, I16, I32, LANES, Instructions, every, long
from workers.kernels.launch import FAST
from workers.kernels.processor import Processor

MOST = 127 * 128 + 63  # of whole numbers


def planes(grouped: Grouped, processor: Processor) -> int:
    """Of whole numbers."""
    return 4 if grouped.bits == 4 else 3 if processor.dot else 2


class Preparer(Instructions):
    """Instructions that make whole numbers of float32."""

    def __init__(self, builder: Any, grouped: Grouped, processor: Processor) -> None:
        super().__init__(builder, processor)
        self.grouped = grouped

    def wholes(self, x: Any, out: Any, step: Any, scales: Any, sums: Any, count: Any) -> None:
        """Planes, `step` bytes apart, and tables of `count` float32, PAIR values or a group at a time."""
        b, group = self.builder, self.grouped.group
        floats = ir.VectorType(FLOAT, LANES)
        size = max(PAIR, group)

        def some(at: Any) -> None:
            values = [
                self.load(x, b.mul(b.add(at, long(start)), long(4)), floats)
                for start in range(0, size, LANES)
            ]
            found = []
            each = group // LANES  # vectors
            for first in range(0, size // LANES, each):
                number = b.sdiv(b.add(at, long(LANES * first)), long(group))
                found += self._group(values[first : first + each], number, scales, sums)
            for start in range(0, size, PAIR):
                self._store(
                    found[start // LANES : (start + PAIR) // LANES], out, step, b.add(at, long(start))
                )

        self.loop(long(0), b.mul(count, long(group)), size, some)

    def _group(self, values: list[Any], number: Any, scales: Any, sums: Any) -> list[Any]:
        """Whole numbers of one group, int32, and its entries in the tables."""
        b, place = self.builder, self.builder.mul(number, long(4))
        floats, words = values[0].type, ir.VectorType(I32, LANES)
        sizes = [b.and_(b.bitcast(some, words), every(words, 0x7FFFFFFF)) for some in values]
        largest = self._reduced(sizes, self._larger)  # as whole numbers NaN is the largest
        finite = b.icmp_signed("<", largest, ir.Constant(I32, 0x7F800000))
        top = b.bitcast(largest, FLOAT)
        usable = b.and_(finite, b.fcmp_ordered(">", top, ir.Constant(FLOAT, 2.0**-110)))
        most = ir.Constant(FLOAT, float(MOST))
        inverse = self.spread(b.fdiv(most, b.select(usable, top, most)))
        mask = self.pick(
            b.insert_element(
                ir.Constant(ir.VectorType(ir.IntType(1), 1), ir.Undefined), usable, ir.Constant(I32, 0)
            ),
            [0] * LANES,
        )
        wholes = []
        for some in values:
            scaled = b.select(mask, b.fmul(some, inverse), every(floats, 0.0))
            rounded = self.instruction(f"llvm.rint.v{LANES}f32", floats, scaled)
            wholes.append(b.fptosi(rounded, words))
        scale = b.fdiv(top, most)  # not finite where a value is not, and then products are neither
        self.store(scale, scales, place)
        if self.grouped.bits == 4:
            about = ir.Constant(FLOAT, 1.0 if self.grouped.minima else -float(CENTRE))
            total = b.sitofp(self._reduced(wholes, b.add), FLOAT)
            self.store(b.fmul(b.fmul(about, scale), total), sums, place)
        return wholes

    def _larger(self, left: Any, right: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed(">", left, right), left, right)

    def _reduced(self, vectors: list[Any], two: Any) -> Any:
        """One number of all lanes."""
        b = self.builder
        while len(vectors) > 1:
            vectors = [two(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
        (value,) = vectors
        while value.type.count > 1:
            half = value.type.count // 2
            value = two(self.pick(value, range(half)), self.pick(value, range(half, 2 * half)))
        return b.extract_element(value, ir.Constant(I32, 0))

    def _store(self, wholes: list[Any], out: Any, step: Any, at: Any) -> None:
        """Planes of PAIR values, int32 in vectors of LANES, from value `at` on."""
        b = self.builder
        words = wholes[0].type
        if self.grouped.bits == 8 and not self.processor.dot:
            shorts = self.concat([b.trunc(some, ir.VectorType(I16, LANES)) for some in wholes])
            parts = [self.pick(shorts, range(first, PAIR, 2)) for first in (0, 1)]
        else:
            high = [b.ashr(b.add(some, every(words, 64)), every(words, 7)) for some in wholes]
            low = [b.sub(some, b.shl(top, every(words, 7))) for some, top in zip(wholes, high, strict=True)]
            both = [[b.trunc(some, ir.VectorType(I8, LANES)) for some in plane] for plane in (high, low)]
            if self.grouped.bits == 4:  # runs of two vectors: the low halves hold the first
                parts = [self.concat(plane[first::2]) for plane in both for first in (0, 1)]
            else:
                parts = [self.concat(plane) for plane in both]
                all_of_them = self.concat(wholes)
                pairs = b.add(*(self.pick(all_of_them, range(first, PAIR, 2)) for first in (0, 1)))
                fours = b.add(*(self.pick(pairs, range(first, PAIR // 2, 2)) for first in (0, 1)))
                parts.append(b.sub(every(fours.type, 0), fours))
        offset = b.lshr(b.mul(at, long(self.grouped.bits)), long(3))
        for plane, part in enumerate(parts):
            self.store(part, out, b.add(b.mul(step, long(plane)), offset))


@intrinsic
def _wholes(typing: Any, codec: Any, x: Any, out: Any, scales: Any, sums: Any) -> Any:
    """Whole numbers of x in `out` [planes, bytes], and for each group a scale and, of four bits, a sum."""
    signature = types.void(codec, x, out, scales, sums)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = Arguments(context, builder, signature, values), format_of(signature.args[0])
        to, tables = given.bytes(2), (given.bytes(3), given.bytes(4))
        Preparer(builder, grouped, processor()).wholes(
            given.bytes(1), to, given.stride(2), *tables, given.length(3)
        )
        return context.get_dummy_value()

    return signature, generate


_make_wholes: Any = _wholes


@njit(fastmath=FAST)
def _sum_groups(x: Any, group: Any, about: Any, sums: Any) -> None:
    """`about` times the sum of each group of x."""
    for number in range(sums.shape[0]):
        total = np.float32(0)
        for value in x[number * group : (number + 1) * group]:
            total += value
        sums[number] = about * total


def preparation(kind: GroupsType) -> Any:
    """For compiled code: the function that prepares x [width] for rows in this format.

    It returns values, scales of whole numbers [groups], and for four bits sums [groups], in this order. Not
    finite values make products that are not.
    """
    grouped = format_of(kind)
    group, bits = grouped.group, grouped.bits
    count = planes(grouped, processor())
    about = np.float32(1 if grouped.minima else -CENTRE)

    def eight(codec: Any, x: Any) -> Any:
        values, scales = np.empty((count, x.shape[0]), np.int8), np.empty(x.shape[0] // group, np.float32)
        _make_wholes(codec, x, values, scales, scales)
        return values, scales

    def four(codec: Any, x: Any) -> Any:
        values, groups = np.empty((count, x.shape[0] // 2), np.int8), x.shape[0] // group
        scales, sums = np.empty(groups, np.float32), np.empty(groups, np.float32)
        _make_wholes(codec, x, values, scales, sums)
        return values, scales, sums

    def exact_eight(codec: Any, x: Any) -> Any:
        return (x,)

    def exact_four(codec: Any, x: Any) -> Any:
        sums = np.empty(x.shape[0] // group, np.float32)
        _sum_groups(x, group, about, sums)
        return x, sums

    if kind.exact:
        return exact_eight if bits == 8 else exact_four
    return eight if bits == 8 else four
