"""Bundles in bulk: assembling a layer's, and their checksums. FORMAT.md, "bundles.bin"."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from storage.families.family import Carrier
from storage.format import CARRIER, Layout

BLOCK_BYTES = 16 << 20  # bundles are assembled, written and hashed in blocks of this size


def spans(layout: Layout) -> Iterator[tuple[int, int]]:
    """The positions of one layer in runs of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // layout.stride)
    for start in range(0, layout.d_ff, step):
        yield start, min(start + step, layout.d_ff)


def assemble(
    layout: Layout, up: Carrier, down: Carrier, order: npt.NDArray[np.int32] | None
) -> Iterator[npt.NDArray[np.uint8]]:
    """A layer's bundles in file order, `[n, stride]` bytes at a time.

    `up` `[d_ff, d_model]` and `down` `[d_model, d_ff]` are carriers; `order` `[d_ff]` is the neuron
    at each position, None when the position is the neuron.
    """
    for start, stop in spans(layout):
        block = np.zeros((stop - start, layout.stride), np.uint8)
        rows = block[:, : layout.rows * layout.row_bytes].view(CARRIER[layout.dtype])
        neurons = slice(start, stop) if order is None else order[start:stop]
        rows[:, : layout.d_model] = up[neurons]
        rows[:, layout.d_model :] = down[:, neurons].T
        yield block


def checksums(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """XXH3-64 of each row of `[n, stride]` bytes."""
    return np.array([xxhash.xxh3_64_intdigest(row.data) for row in block], "<u8")
