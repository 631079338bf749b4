"""Where every unit of a store lies, and where in it each row. FORMAT.md, "bundles.bin".

A layer's FFN is cut into units, which are read as a whole. A unit is one neuron's rows, its *bundle*, or
those of `width` neurons. Readers ask the unit where a row is, and never compute it themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from storage.codecs import CODECS, F32, Carrier, Codec

Position = TypeVar("Position", int, npt.NDArray[np.int64])
# Of a row: gate and up make a neuron's activation, and down is what that is multiplied with.
Role: TypeAlias = Literal["gate", "up", "down"]
ROLES: dict[str, tuple[Role, ...]] = {  # of a unit's rows, in their order, by `architecture.Ffn.kind`
    "plain": ("up", "down"),
    "gated": ("gate", "up", "down"),
}

DEFAULT_ALIGNMENT = 512  # bytes
I32: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Row:
    """One of a neuron's rows of `d_model` values; `codec` is a name in `codecs.CODECS`."""

    role: Role
    codec: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Vectors of one length, one in each line of some memory: a matrix, or one role's rows of many units.

    A vector's `width` values begin at element `start` of its line. With `count` above one, a line holds that
    many vectors, one behind the other.
    """

    memory: Carrier  # [lines, elements], in C order
    codec: Codec
    start: int
    width: int
    count: int = 1

    @classmethod
    def of_matrix(cls, matrix: Carrier, codec: Codec) -> Rows:
        """The lines of a matrix, whole."""
        width = matrix.shape[-1] * matrix.itemsize // codec.bytes * codec.block
        return cls(matrix, codec, 0, width)

    @property
    def elements(self) -> int:
        """Of the carrier, in one vector."""
        return self.codec.elements(self.width)

    @property
    def values(self) -> Carrier:
        """As stored: `[lines, elements of its vectors]`, a view."""
        return self.memory[:, self.start : self.start + self.count * self.elements]

    def widened(self) -> F32:
        """A float32 copy, `[vectors, width]`: those of the first line, then those of the second."""
        return self.codec.widen(np.ascontiguousarray(self.values).reshape(-1, self.elements))


@dataclass(frozen=True, slots=True)
class Unit:
    """What one read brings: `width` neurons' rows, role after role, padded to `stride` bytes.

    A row is one neuron's, of `d_model` values. The down rows of a unit of several neurons are the outputs'
    instead: `d_model` rows of `width` values.
    """

    rows: tuple[Row, ...]
    width: int  # neurons
    d_model: int
    alignment: int = DEFAULT_ALIGNMENT  # bytes

    @property
    def bytes(self) -> int:
        """Of all rows, without the padding."""
        return sum(self._bytes(row) for row in self.rows)

    @property
    def stride(self) -> int:
        """Bytes from one unit to the next."""
        return -(-self.bytes // self.alignment) * self.alignment

    @property
    def kind(self) -> str:
        """What it is called beside its number."""
        return "neuron" if self.width == 1 else "unit"

    def span(self, role: Role) -> tuple[int, int]:
        """The bytes [start, stop) of a role's rows within the unit. Raises KeyError for a role it has not."""
        start = 0
        for row in self.rows:
            stop = start + self._bytes(row)
            if row.role == role:
                return start, stop
            start = stop
        raise KeyError(role)

    def row_bytes(self, role: Role) -> int:
        """Of one role's rows in the unit."""
        start, stop = self.span(role)
        return stop - start

    def codec(self, role: Role) -> Codec:
        """Raises KeyError for a role that the unit has not."""
        return CODECS[next((row.codec for row in self.rows if row.role == role), role)]

    def view(self, memory: npt.NDArray[np.uint8], role: Role) -> Rows:
        """A role's rows of the units in `memory` `[units, stride]` bytes; nothing is copied."""
        codec, (start, _), (count, width) = self.codec(role), self.span(role), self.shape(role)
        return Rows(
            memory.view(codec.carrier), codec, start // np.dtype(codec.carrier).itemsize, width, count
        )

    def shape(self, role: Role) -> tuple[int, int]:
        """A role's rows in the unit, and values of one."""
        by_output = role == "down" and self.width > 1
        return (self.d_model, self.width) if by_output else (self.width, self.d_model)

    def _bytes(self, row: Row) -> int:
        count, width = self.shape(row.role)
        return count * CODECS[row.codec].size(width)


def neurons_of(ids: I32, width: int) -> I32:
    """The neurons of units of `width`, unit after unit, `[n · width]`, from the units' ids `[n]`."""
    if width == 1:
        return ids
    found: I32 = np.add.outer(ids * np.int32(width), np.arange(width, dtype=np.int32)).reshape(-1)
    return found


def check_alignment(alignment: Any) -> None:
    """Raises ValueError for what is no power of two."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment!r:.40} bytes")


def neuron(codec: str, d_model: int, alignment: int = DEFAULT_ALIGNMENT, kind: str = "plain") -> Unit:
    """One neuron's rows, as FFNs of this kind have them, all in one codec."""
    return Unit(tuple(Row(role, codec) for role in ROLES[kind]), 1, d_model, alignment)


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer's part of `bundles.bin`. Without units, the layer has nothing on flash."""

    units: int
    unit: Unit
    start: int  # byte of the layer's first unit
    first: int  # units of all layers before

    @property
    def bytes(self) -> int:
        return self.units * self.unit.stride

    def offset(self, position: Position) -> Position:
        """The byte at which the unit at this position begins; also of many positions at once."""
        return self.start + position * self.unit.stride


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a store's units lie. Sizes in bytes."""

    layers: tuple[LayerLayout, ...]

    @classmethod
    def of(cls, layers: Iterable[tuple[int, Unit]]) -> Layout:
        """Layers of so many units, one behind the other."""
        placed: list[LayerLayout] = []
        start = first = 0
        for units, unit in layers:
            placed.append(LayerLayout(units, unit, start, first))
            start, first = start + placed[-1].bytes, first + units
        return cls(tuple(placed))

    @classmethod
    def uniform(cls, layers: int, units: int, unit: Unit) -> Layout:
        """Layers that are all alike."""
        return cls.of([(units, unit)] * layers)

    @property
    def units(self) -> tuple[int, ...]:
        """Of each layer."""
        return tuple(layer.units for layer in self.layers)

    @property
    def unit(self) -> Unit:
        """Of the first layer that has any."""
        return next(layer.unit for layer in self.layers if layer.units)

    @property
    def most_units(self) -> int:
        """Of any layer."""
        return max(self.units, default=0)

    @property
    def total_units(self) -> int:
        return sum(self.units)

    @property
    def stride(self) -> int:
        """Of the largest unit: what a slot must hold."""
        return max((layer.unit.stride for layer in self.layers if layer.units), default=0)

    @property
    def total_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def useful_bytes(self) -> int:
        """Without padding."""
        return sum(layer.units * layer.unit.bytes for layer in self.layers)

    def offset(self, layer: int, position: int) -> int:
        return self.layers[layer].offset(position)

    def place(self, offset: int) -> tuple[int, int]:
        """Layer and position of the unit that holds this byte of `bundles.bin`."""
        layer = max(i for i, one in enumerate(self.layers) if one.units and one.start <= offset)
        return layer, (offset - self.layers[layer].start) // self.layers[layer].unit.stride

    def split(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """An array of one value for each unit, cut by layer."""
        return tuple(values[layer.first : layer.first + layer.units] for layer in self.layers)
