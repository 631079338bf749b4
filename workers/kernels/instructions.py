"""Code for LLVM that numba's own types cannot say: products of whole numbers in eight and four bits.

A dot product of stored whole numbers with float32 values would spend its time on making floats of codes. So
the values become whole numbers, too, of 16 bits with a scale for each group (`prepare.py`), and the
processor's own instruction multiplies and adds pairs of them: `vpmaddwd` where the codes have eight bits,
`vpdpbusd` or `vpmaddubsw` where they have four and the values come as two planes of eight bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir

from workers.kernels.processor import Processor

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
LANES = 16  # float32 sums of one row
CONTRACT = ("contract",)


class Instructions:
    """What a processor has, put where `builder` stands."""

    def __init__(self, builder: Any, processor: Processor) -> None:
        self.builder = builder
        self.processor = processor

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
        read, near, data_cache = (ir.Constant(I32, number) for number in (0, 2, 1))
        self.builder.call(prefetch, [self.builder.gep(base, [offset]), read, near, data_cache])

    def fma(self, total: Any, left: Any, right: Any) -> Any:
        product = self.builder.fmul(left, right, flags=CONTRACT)
        return self.builder.fadd(total, product, flags=CONTRACT)

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

    def concat(self, parts: Sequence[Any]) -> Any:
        """Vectors of one length as a long one; so many that they pair up."""
        while len(parts) > 1:
            lanes = ir.Constant(
                ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count))
            )
            parts = [
                self.builder.shuffle_vector(*two, lanes) for two in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    def split(self, value: Any, count: int) -> list[Any]:
        """A vector as vectors of `count`."""
        if value.type.count == count:
            return [value]
        return [self.pick(value, range(start, start + count)) for start in range(0, value.type.count, count)]

    def products(self, left: Any, right: Any) -> Any:
        """Sums of neighbours' products: pairs of int16 as int32."""
        count = left.type.count
        if self.processor.madd and count % 16 == 0:
            parts = zip(self.split(left, 16), self.split(right, 16), strict=True)
            words = ir.VectorType(I32, 8)
            return self.concat([self.instruction("llvm.x86.avx2.pmadd.wd", words, *two) for two in parts])
        wide = ir.VectorType(I32, count)
        each = self.builder.mul(self.builder.sext(left, wide), self.builder.sext(right, wide))
        return self.builder.add(self.pick(each, range(0, count, 2)), self.pick(each, range(1, count, 2)))

    def pairs(self, codes: Any, plane: Any) -> Any:
        """Sums of neighbours' products: pairs of bytes, of which `codes` have no sign, as int16."""
        count = codes.type.count
        if self.processor.madd and count % 32 == 0:
            parts = zip(self.split(codes, 32), self.split(plane, 32), strict=True)
            shorts = ir.VectorType(I16, 16)
            return self.concat([self.instruction("llvm.x86.avx2.pmadd.ub.sw", shorts, *two) for two in parts])
        wide = ir.VectorType(I16, count)
        each = self.builder.mul(self.builder.zext(codes, wide), self.builder.sext(plane, wide))
        return self.builder.add(self.pick(each, range(0, count, 2)), self.pick(each, range(1, count, 2)))

    def dot(self, total: Any, codes: Any, plane: Any) -> Any:
        """`total` int32, and to each lane the products of four neighbouring bytes, by vpdpbusd."""
        size = 16 if self.processor.wide and total.type.count == 16 else 8
        name = f"llvm.x86.avx512.vpdpbusd.{32 * size}"
        found = []
        for some, *two in zip(
            self.split(total, size), self.split(codes, 4 * size), self.split(plane, 4 * size), strict=True
        ):
            if binding.llvm_version_info < (22,):  # which took the bytes for words
                of_words = [self.builder.bitcast(one, some.type) for one in two]
                found.append(self.instruction(name, some.type, some, *of_words))
            else:
                found.append(self.instruction(name, some.type, some, *two))
        return self.concat(found)

    def instruction(self, name: str, returns: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(returns, [one.type for one in arguments])
        return self.builder.call(self.builder.module.declare_intrinsic(name, (), kind), arguments)

    def nibbles(self, codes: Any) -> tuple[Any, Any]:
        """The low and the high halves of bytes. Shifted as words, since no processor shifts bytes."""
        b, mask = self.builder, every(codes.type, 15)
        shorts = ir.VectorType(I16, codes.type.count // 2)
        shifted = b.lshr(b.bitcast(codes, shorts), every(shorts, 4))
        return b.and_(codes, mask), b.and_(b.bitcast(shifted, codes.type), mask)

    def sum(self, value: Any) -> Any:
        b = self.builder
        while value.type.count > 1:
            half = value.type.count // 2
            low, high = self.pick(value, range(half)), self.pick(value, range(half, 2 * half))
            if half == 1:
                zero = ir.Constant(I32, 0)
                return b.fadd(b.extract_element(low, zero), b.extract_element(high, zero))
            value = b.fadd(low, high)
        raise AssertionError("a vector of one")

    def spread(self, value: Any) -> Any:
        """One float32 in all lanes."""
        one = self.builder.insert_element(
            ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined), value, ir.Constant(I32, 0)
        )
        return self.pick(one, [0] * LANES)


def long(value: int) -> Any:
    return ir.Constant(I64, value)


def every(kind: Any, value: float) -> Any:
    """A vector of this type, with the same number everywhere."""
    return ir.Constant(kind, [value] * kind.count)
