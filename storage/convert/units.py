"""A conversion's units in file order, made from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from storage.bundles import assemble
from storage.codecs import Carrier
from storage.convert.conversion import Conversion
from storage.convert.rows import unit_rows
from storage.families.family import Source
from storage.layout import Role, Unit

Block = npt.NDArray[np.uint8]  # [units, stride]


def of_layer(conversion: Conversion, layer: int) -> Iterator[Block]:
    """All of a layer's, in blocks. Of neurons the whole layer is in memory, of experts one at a time."""
    for _, block in chosen(conversion, layer, None):
        yield block


def chosen(
    conversion: Conversion, layer: int, positions: npt.NDArray[np.int64] | None
) -> Iterator[tuple[int, Block]]:
    """Blocks that hold at least the units at these file positions, each with the position of its first unit.

    None: all. Experts come one at a time, and only those that are asked for.
    """
    part = conversion.layout.layers[layer]
    order = None if conversion.order is None else conversion.order.neurons[layer]
    if conversion.architecture.layers[layer].ffn.router is not None:
        for position in range(part.units) if positions is None else positions.tolist():
            expert = position if order is None else int(order[position])
            rows = _rows(conversion, conversion.expert(layer, expert), part.unit)
            for block in assemble(replace(part, units=1), rows, None):
                yield position, block
    elif part.units:
        rows = _rows(conversion, conversion.family.ffn(conversion.architecture, layer), part.unit)
        start = 0
        for block in assemble(part, rows, order):
            yield start, block
            start += len(block)
    conversion.checkpoint.release()


def _rows(conversion: Conversion, sources: Mapping[Role, Source], unit: Unit) -> dict[Role, Carrier]:
    return {
        role: unit_rows(role, conversion.read(source), conversion.dtype(source), unit)
        for role, source in sources.items()
    }
