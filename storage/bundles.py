"""Units in bulk: assembling a layer's, and their checksums. FORMAT.md, "bundles.bin"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import xxhash

from storage.codecs import Carrier
from storage.layout import LayerLayout, Role

BLOCK_BYTES = 16 << 20  # units are assembled, written and hashed in blocks of this size


def spans(part: LayerLayout) -> Iterator[tuple[int, int]]:
    """The positions of one layer in runs of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // part.unit.stride)
    for start in range(0, part.units, step):
        yield start, min(start + step, part.units)


def assemble(
    part: LayerLayout, rows: Mapping[Role, Carrier], order: npt.NDArray[np.int32] | None
) -> Iterator[npt.NDArray[np.uint8]]:
    """A layer's units in file order, `[n, stride]` bytes at a time.

    `rows` `[neurons, d_model]` are carriers, by ascending id; `order` `[units]` is the unit at each
    position, None when the position is the unit.
    """
    unit = part.unit
    for start, stop in spans(part):
        block = np.zeros((stop - start, unit.stride), np.uint8)
        which = slice(start, stop) if order is None else order[start:stop]
        for role, matrix in rows.items():
            values = unit.view(block, role).values
            values[:] = matrix.reshape(part.units, -1)[which]
        yield block


def checksums(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """XXH3-64 of each row of `[n, stride]` bytes."""
    return np.array([xxhash.xxh3_64_intdigest(row.data) for row in block], "<u8")
