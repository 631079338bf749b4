"""What the loops need of rows in eight and four bits: the same calls as of rows of floats, in `rows.py`.

`emitter.py` has what each of them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from storage.codecs import LOW_BITS, Codec
from storage.lowbits import Grouped
from workers.kernels.codecs import digest
from workers.kernels.emitter import ROWS, Products, Sums, Vector, WholeProducts
from workers.kernels.instructions import I8, long
from workers.kernels.processor import Processor


@dataclass(frozen=True)
class Groups:
    """A format of few bits, as compiled code takes it: without a value, with a type of its own."""

    name: str  # as in `storage.codecs.CODECS`
    exact: bool  # activations are not rounded

    @cached_property
    def _numba_type_(self) -> GroupsType:  # what numba asks an argument for
        return GroupsType(self.name, self.exact, digest())


class GroupsType(types.Type):
    """The type of one format's `Groups` in compiled code."""

    def __init__(self, codec: str, exact: bool, revision: str) -> None:
        self.codec, self.exact = codec, exact
        super().__init__(f"Groups({codec}, {'exact' if exact else 'rounded'}, {revision})")


register_model(GroupsType)(models.OpaqueModel)


@unbox(GroupsType)  # type: ignore[no-untyped-call, untyped-decorator]
def _without_value(kind: Any, value: Any, compiled: Any) -> Any:
    return NativeValue(compiled.context.get_dummy_value())  # type: ignore[no-untyped-call]


GROUPS = {(codec.name, exact): Groups(codec.name, exact) for codec in LOW_BITS for exact in (False, True)}
_FORMATS: dict[str, Grouped] = {
    codec.name: codec.grouped for codec in LOW_BITS if isinstance(codec.grouped, Grouped)
}
_PROCESSOR = Processor.here()


def processor() -> Processor:
    """What code is made for."""
    return _PROCESSOR


def groups(codec: Codec, exact: bool) -> Groups:
    """What kernels take for `codec`. Raises KeyError for one of floats."""
    return GROUPS[codec.name, exact]


def format_of(kind: GroupsType) -> Grouped:
    """How the values of a compiled argument's format are written."""
    return _FORMATS[kind.codec]


class Arguments:
    """A compiled call's arguments, as addresses and numbers. One of a tuple is named by both places."""

    def __init__(self, context: Any, builder: Any, signature: Any, values: Any) -> None:
        self.context, self.builder, self.signature, self.values = context, builder, signature, values

    def _array(self, number: int, within: int | None) -> Any:
        kind, value = self.signature.args[number], self.values[number]
        if within is not None:
            kind, value = kind[within], self.builder.extract_value(value, within)
        return self.context.make_array(kind)(self.context, self.builder, value)

    def bytes(self, number: int, within: int | None = None) -> Any:
        """The address of an array."""
        return self.builder.bitcast(self._array(number, within).data, I8.as_pointer())

    def length(self, number: int, within: int | None = None) -> Any:
        return self.builder.extract_value(self._array(number, within).shape, 0)

    def stride(self, number: int, within: int | None = None) -> Any:
        """Bytes from one line of an array to the next."""
        return self.builder.extract_value(self._array(number, within).strides, 0)

    def places(self, memory: Any, number: int) -> list[Any]:
        """Addresses in `memory`, of a tuple of offsets."""
        offsets = (self.builder.extract_value(self.values[number], index) for index in range(ROWS))
        return [self.builder.gep(memory, [offset]) for offset in offsets]

    def groups(self, grouped: Grouped, width: Any) -> Any:
        return self.builder.sdiv(width, long(grouped.group))

    def prepared(self, number: int) -> Vector:
        """A prepared vector, whose last array is, for four bits, the sums."""
        exact, four = self.signature.args[0].exact, format_of(self.signature.args[0]).bits == 4
        values = self.bytes(number, 0)
        step, scales = (None, None) if exact else (self.stride(number, 0), self.bytes(number, 1))
        return Vector(values, step, scales, self.bytes(number, 1 if exact else 2) if four else None)


@intrinsic
def _dots(typing: Any, codec: Any, memory: Any, at: Any, following: Any, x: Any) -> Any:
    """Products of the rows `at` four offsets with a prepared vector (`prepare.py`)."""
    returns = types.UniTuple(types.float32, ROWS)  # type: ignore[no-untyped-call]
    signature = returns(codec, memory, at, following, x)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, kind = Arguments(context, builder, signature, values), signature.args[0]
        grouped, base = format_of(kind), given.bytes(1)
        emit = (Products if kind.exact else WholeProducts)(builder, grouped, processor())
        groups = given.groups(grouped, given.length(4, 0)) if kind.exact else given.length(4, 1)
        found = emit.dots(given.places(base, 2), given.places(base, 3), given.prepared(4), groups)
        return context.make_tuple(builder, signature.return_type, found)

    return signature, generate


@intrinsic
def _add_four(
    typing: Any, codec: Any, y: Any, a: Any, memory: Any, at: Any, following: Any, column: Any, width: Any
) -> Any:
    """y[j] += a[0] · row 0's value column + j, then that of row 1, of row 2, of row 3."""
    signature = types.void(codec, y, a, memory, at, following, column, width)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = Arguments(context, builder, signature, values), format_of(signature.args[0])
        emit = Sums(builder, grouped, processor())
        numbers, memory = given.bytes(2), given.bytes(3)
        a = [emit.load(numbers, long(4 * index), ir.FloatType()) for index in range(ROWS)]
        column, width = values[6], values[7]
        stop = builder.add(column, given.length(1))
        rows, later = given.places(memory, 4), given.places(memory, 5)
        emit.add(given.bytes(1), rows, later, a, column, stop, given.groups(grouped, width))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _add_one(typing: Any, codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> Any:
    """As `_add_four`, for one row, and one number."""
    signature = types.void(codec, y, a, memory, at, column, width)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = Arguments(context, builder, signature, values), format_of(signature.args[0])
        column, width = values[5], values[6]
        stop = builder.add(column, given.length(1))
        row = builder.gep(given.bytes(3), [values[4]])
        Sums(builder, grouped, processor()).add(
            given.bytes(1), [row], [], [values[2]], column, stop, given.groups(grouped, width)
        )
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _widen(typing: Any, codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> Any:
    """out[j] = the value column + j of the row of `width` values at this offset."""
    signature = types.void(codec, memory, at, column, width, out)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = Arguments(context, builder, signature, values), format_of(signature.args[0])
        column, width = values[3], values[4]
        row = builder.gep(given.bytes(1), [values[2]])
        stop = builder.add(column, given.length(5))
        Sums(builder, grouped, processor()).widen(
            given.bytes(5), row, column, stop, given.groups(grouped, width)
        )
        return context.get_dummy_value()

    return signature, generate


dots: Any = _dots  # called by compiled code without the typing context
add_four: Any = _add_four
add_one: Any = _add_one
widen: Any = _widen
