"""What the loops need of a float format: one value widened to float32, and rounded back. One table.

A kernel takes a codec's `Scalars` as an argument, and calls `codec.widen(value)`. To numba each `Scalars` is
of a type of its own, and has no value at run time. So a loop is compiled once for each codec in use, with
that codec's function inlined, and nothing is decided while it runs.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import NativeValue, intrinsic, models, overload_method, register_model, unbox

from storage.codecs import BFLOAT16, FLOAT16, FLOAT32, Codec
from workers.kernels.processor import Processor


@dataclass(frozen=True)
class Scalars:
    """A codec's functions of one value; both are called by compiled code only.

    Numba finds a compiled kernel, also on disk, by the types of its arguments. Of what has changed since,
    it looks at the file that defines the kernel only, but a loop is put together from several files.
    Therefore the type names a digest of them all.
    """

    name: str  # as in `storage.codecs.CODECS`
    widen: Any  # carrier → float32
    narrow: Any  # float32 → carrier

    @cached_property
    def _numba_type_(self) -> ScalarsType:  # what numba asks an argument for
        return ScalarsType(self.name, digest(self.widen, self.narrow))


class ScalarsType(types.Type):
    """The type of one codec's `Scalars` in compiled code."""

    def __init__(self, codec: str, revision: str) -> None:
        self.codec = codec
        super().__init__(f"Scalars({codec}, {revision})")


@cache
def _package() -> bytes:
    """The source of all kernels."""
    return b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


def digest(*functions: Any) -> str:
    """Of all that loops are put together from: this package, and these functions."""
    found = hashlib.sha256(_package())
    for function in functions:
        source = Path(inspect.unwrap(function).__code__.co_filename)
        found.update(source.read_bytes() + function.__qualname__.encode())
    return found.hexdigest()[:16]


register_model(ScalarsType)(models.OpaqueModel)


@unbox(ScalarsType)  # type: ignore[no-untyped-call, untyped-decorator]
def _without_value(kind: Any, value: Any, compiled: Any) -> Any:
    return NativeValue(compiled.context.get_dummy_value())  # type: ignore[no-untyped-call]


@overload_method(ScalarsType, "widen", inline="always")
def _widen(codec: Any, value: Any) -> Any:
    function = SCALARS[codec.codec].widen

    def widen(codec: Any, value: Any) -> Any:
        return function(value)

    return widen


@overload_method(ScalarsType, "narrow", inline="always")
def _narrow(codec: Any, value: Any) -> Any:
    function = SCALARS[codec.codec].narrow

    def narrow(codec: Any, value: Any) -> Any:
        return function(value)

    return narrow


@intrinsic
def _bits(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits are the uint32 `bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


as_float: Any = _bits  # called by compiled code with the bits alone


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


_as_bits: Any = _bits_of


@njit(inline="always")
def _single(value: Any) -> Any:
    """float32, as it is."""
    return np.float32(value)


@intrinsic
def _native_half(typing_context: Any, bits: Any) -> Any:
    """float16 → float32 by the processor's own instruction, sixteen at a time where there is AVX-512."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@njit(inline="always")
def integer_half(bits: Any) -> Any:
    """float16 → float32, exact for every finite value: exponents are re-biased by the product."""
    wide = np.uint32(bits)
    moved = ((wide & np.uint32(0x7FFF)) << np.uint32(13)) | ((wide & np.uint32(0x8000)) << np.uint32(16))
    return as_float(np.uint32(moved)) * np.float32(2.0**112)


def _converts_halves() -> bool:
    """Whether the processor has the instruction; elsewhere LLVM would call a library that is not there."""
    return Processor.here().half


@njit(inline="always")
def _to_half(value: Any) -> Any:
    """float32 → float16, to the nearest, ties to even; what is beyond its range becomes its largest."""
    bits = _as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    if size > np.uint32(0x7F800000):  # NaN
        return np.uint16(sign | np.uint32(0x7E00))
    size = min(size, np.uint32(0x477FE000))  # 65,504
    if size < np.uint32(0x38800000):  # below the least normal: adding ½ leaves units of 2⁻²⁴ in the last bits
        small = _as_bits(as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000)
        return np.uint16(sign | np.uint32(small))
    tie = (size >> np.uint32(13)) & np.uint32(1)
    rounded = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + tie) >> np.uint32(13)
    return np.uint16(sign | np.uint32(rounded))


@njit(inline="always")
def _brain(bits: Any) -> Any:
    """bfloat16 → float32."""
    return as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@njit(inline="always")
def _to_brain(value: Any) -> Any:
    """float32 → bfloat16, to the nearest, ties to even."""
    bits = _as_bits(value)
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + tie) >> np.uint32(16))


SCALARS: dict[str, Scalars] = {
    one.name: one
    for one in (
        Scalars(FLOAT32.name, _single, _single),
        Scalars(FLOAT16.name, _native_half if _converts_halves() else integer_half, _to_half),
        Scalars(BFLOAT16.name, _brain, _to_brain),
    )
}


def scalars(codec: Codec) -> Scalars:
    """What kernels take for a `codec` of floats. Raises KeyError for another."""
    return SCALARS[codec.name]
