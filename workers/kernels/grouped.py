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
from workers.kernels.emitter import ROWS, Emitter
from workers.kernels.instructions import I8, Processor, long


@dataclass(frozen=True)
class Groups:
    """A format of few bits, as compiled code takes it: without a value, with a type of its own."""

    name: str  # as in `storage.codecs.CODECS`

    @cached_property
    def _numba_type_(self) -> GroupsType:  # what numba asks an argument for
        return GroupsType(self.name, digest())


class GroupsType(types.Type):
    """The type of one format's `Groups` in compiled code."""

    def __init__(self, codec: str, revision: str) -> None:
        self.codec = codec
        super().__init__(f"Groups({codec}, {revision})")


register_model(GroupsType)(models.OpaqueModel)


@unbox(GroupsType)  # type: ignore[no-untyped-call, untyped-decorator]
def _without_value(kind: Any, value: Any, compiled: Any) -> Any:
    return NativeValue(compiled.context.get_dummy_value())  # type: ignore[no-untyped-call]


GROUPS = {codec.name: Groups(codec.name) for codec in LOW_BITS}
_FORMATS: dict[str, Grouped] = {
    codec.name: codec.grouped for codec in LOW_BITS if isinstance(codec.grouped, Grouped)
}
_PROCESSOR = Processor.here()


def groups(codec: Codec) -> Groups:
    """What kernels take for `codec`. Raises KeyError for one of floats."""
    return GROUPS[codec.name]


def format_of(kind: GroupsType) -> Grouped:
    """How the values of a compiled argument's format are written."""
    return _FORMATS[kind.codec]


class _Arguments:
    """A compiled call's arguments, as addresses and numbers."""

    def __init__(self, context: Any, builder: Any, signature: Any, values: Any) -> None:
        self.context, self.builder, self.signature, self.values = context, builder, signature, values

    def _array(self, number: int) -> Any:
        return self.context.make_array(self.signature.args[number])(
            self.context, self.builder, self.values[number]
        )

    def bytes(self, number: int) -> Any:
        """The address of an array."""
        return self.builder.bitcast(self._array(number).data, I8.as_pointer())

    def length(self, number: int) -> Any:
        return self.builder.extract_value(self._array(number).shape, 0)

    def places(self, memory: Any, number: int) -> list[Any]:
        """Addresses in `memory`, of a tuple of offsets."""
        offsets = (self.builder.extract_value(self.values[number], index) for index in range(ROWS))
        return [self.builder.gep(memory, [offset]) for offset in offsets]

    def groups(self, grouped: Grouped, width: Any) -> Any:
        return self.builder.sdiv(width, long(grouped.group))


@intrinsic
def _dots(
    typing: Any, codec: Any, memory: Any, at: Any, following: Any, values: Any, scales: Any, sums: Any
) -> Any:
    """Products of the rows `at` four offsets with a prepared vector (`prepare.py`)."""
    returns = types.UniTuple(types.float32, ROWS)  # type: ignore[no-untyped-call]
    signature = returns(codec, memory, at, following, values, scales, sums)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = _Arguments(context, builder, signature, values), format_of(signature.args[0])
        emit, base = Emitter(builder, grouped, _PROCESSOR), given.bytes(1)
        x = given.bytes(4), given.bytes(5), given.bytes(6)
        found = emit.dots(given.places(base, 2), given.places(base, 3), x, given.length(5))
        return context.make_tuple(builder, signature.return_type, found)

    return signature, generate


@intrinsic
def _add_four(typing: Any, codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> Any:
    """y[j] += a[0] · row 0's value column + j, then that of row 1, of row 2, of row 3."""
    signature = types.void(codec, y, a, memory, at, column, width)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = _Arguments(context, builder, signature, values), format_of(signature.args[0])
        emit = Emitter(builder, grouped, _PROCESSOR)
        numbers = given.bytes(2)
        a = [emit.load(numbers, long(4 * index), ir.FloatType()) for index in range(ROWS)]
        column, width = values[5], values[6]
        stop = builder.add(column, given.length(1))
        rows = given.places(given.bytes(3), 4)
        emit.add(given.bytes(1), rows, a, column, stop, given.groups(grouped, width))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _add_one(typing: Any, codec: Any, y: Any, a: Any, memory: Any, at: Any, column: Any, width: Any) -> Any:
    """As `_add_four`, for one row, and one number."""
    signature = types.void(codec, y, a, memory, at, column, width)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = _Arguments(context, builder, signature, values), format_of(signature.args[0])
        emit = Emitter(builder, grouped, _PROCESSOR)
        column, width = values[5], values[6]
        stop = builder.add(column, given.length(1))
        row = builder.gep(given.bytes(3), [values[4]])
        emit.add(given.bytes(1), [row], [values[2]], column, stop, given.groups(grouped, width))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _widen(typing: Any, codec: Any, memory: Any, at: Any, column: Any, width: Any, out: Any) -> Any:
    """out[j] = the value column + j of the row of `width` values at this offset."""
    signature = types.void(codec, memory, at, column, width, out)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, grouped = _Arguments(context, builder, signature, values), format_of(signature.args[0])
        column, width = values[3], values[4]
        row = builder.gep(given.bytes(1), [values[2]])
        stop = builder.add(column, given.length(5))
        Emitter(builder, grouped, _PROCESSOR).widen(
            given.bytes(5), row, column, stop, given.groups(grouped, width)
        )
        return context.get_dummy_value()

    return signature, generate


dots: Any = _dots  # called by compiled code without the typing context
add_four: Any = _add_four
add_one: Any = _add_one
widen: Any = _widen
