"""What a store's bytes should be: the checksum of each unit, and how a damaged one is called.

`checksums.bin` has the XXH3-64 of every unit in file order (FORMAT.md). It is small, so it is held in memory,
after a look at its own hash in the manifest: else a flipped bit in it would accuse a sound unit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from storage.bundles import BLOCK_BYTES
from storage.errors import StoreCorrupt
from storage.files import blocks, from_disk
from storage.manifest import BUNDLES, CHECKSUM_BYTES, CHECKSUMS, ORDER
from storage.store import Store

I32 = npt.NDArray[np.int32]


class UnitSums:
    """The checksum of every unit of one store."""

    def __init__(self, store: Store, values: npt.NDArray[np.uint64]) -> None:
        """`values` `[units]`, in file order."""
        self._store = store
        self._layers = store.layout.split(values)

    @classmethod
    def of(cls, store: Store) -> UnitSums | None:
        """None for a store that has no checksum for each unit.

        Raises StoreCorrupt where the checksums, or the order of the units, are not those of the manifest.
        """
        listed = store.manifest.files.get(CHECKSUMS)
        if listed is None or listed.bytes != store.layout.total_units * CHECKSUM_BYTES:
            return None
        for name in (CHECKSUMS, ORDER):
            if name in store.manifest.files:
                check_small(store, name)
        return cls(store, np.fromfile(store.path / CHECKSUMS, "<u8"))

    def wrong(self, layer: int, positions: I32, slots: I32, memory: memoryview, stride: int) -> list[int]:
        """Which of the units at these file positions are not in their slots as they were written: indices.

        `memory` is bytes, `stride` those of a slot.
        """
        expected, size = self._layers[layer][positions].tolist(), self._store.layout.layers[layer].unit.stride
        starts = (slots.astype(np.int64) * stride).tolist()
        digest = xxhash.xxh3_64_intdigest
        return [
            index
            for index, start in enumerate(starts)
            if digest(memory[start : start + size]) != expected[index]
        ]


def check_small(store: Store, name: str) -> None:
    """Compare a file that fits into memory with its hash. Raises StoreCorrupt."""
    if xxhash.xxh3_128_hexdigest((store.path / name).read_bytes()) != store.manifest.files[name].xxh3_128:
        raise StoreCorrupt(damaged_file(store, name))


def check_file(store: Store, name: str) -> None:
    """Compare a file of any size with its hash, block by block. Raises StoreCorrupt."""
    digest = xxhash.xxh3_128()
    with from_disk(store.path / name) as file:
        for block in blocks(file, BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != store.manifest.files[name].xxh3_128:
        raise StoreCorrupt(damaged_file(store, name))


def damaged_file(store: Store, name: str) -> str:
    """A sentence for a file that is not what the manifest says."""
    return f"{store.path / name} does not match its hash in the manifest; {mend(store)}"


def damaged_unit(store: Store, layer: int, position: int) -> str:
    """A sentence for a unit that does not match its checksum."""
    order = store.order()
    number = position if order is None else int(order[layer][position])
    kind = store.layout.layers[layer].unit.kind
    return (
        f"{store.path / BUNDLES}: the bundle of layer {layer}, {kind} {number}, at byte "
        f"{store.layout.offset(layer, position):,}, does not match its checksum; {mend(store)}"
    )


def mend(store: Store) -> str:
    """What helps against damage."""
    return f"`run.py repair {store.path} --from CHECKPOINT` mends it"
