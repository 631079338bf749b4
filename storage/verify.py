"""Re-read a whole store against its checksums and hashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from storage import shadow
from storage.bundles import BLOCK_BYTES, checksums, spans
from storage.errors import StoreCorrupt, StoreError
from storage.files import blocks, from_disk
from storage.manifest import BUNDLES, CHECKSUM_BYTES, CHECKSUMS, ORDER
from storage.store import Store
from storage.sums import damaged_file, damaged_unit

Progress = Callable[[str, int, int], None]  # (file name, bytes done, bytes in all)


def verify(path: Path, progress: Progress | None = None) -> None:
    """Read every byte that the manifest vouches for.

    And the store's shadow, where it has one.

    Raises StoreCorrupt naming the first bad bundle (layer, neuron, byte offset) or the bad file,
    StoreError for a directory that cannot be opened as a store.
    """
    store = Store.open(path)
    report = progress or (lambda name, done, total: None)
    for name in store.manifest.files:
        if name != BUNDLES:
            _verify_file(store, name, report)
    _verify_order(store)
    _verify_bundles(store, report)
    shadow.verify(store, lambda done, total: report(shadow.path_of(store).name, done, total))


def _verify_file(store: Store, name: str, report: Progress) -> None:
    entry, digest, done = store.manifest.files[name], xxhash.xxh3_128(), 0
    with from_disk(store.path / name) as file:
        for block in blocks(file, BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            report(name, done, entry.bytes)
    if digest.hexdigest() != entry.xxh3_128:
        raise StoreCorrupt(damaged_file(store, name))


def _verify_order(store: Store) -> None:
    order = store.order()
    if order is not None and not all((np.sort(one) == np.arange(one.size)).all() for one in order):
        raise StoreCorrupt(f"{store.path / ORDER} is not a permutation of the neurons in every layer")


def _verify_bundles(store: Store, report: Progress) -> None:
    layout, digest = store.layout, xxhash.xxh3_128()
    listed = store.manifest.files.get(CHECKSUMS)
    if listed is None or listed.bytes != layout.total_units * CHECKSUM_BYTES:
        raise StoreError(f"{store.path / CHECKSUMS} does not have a checksum for each unit")
    expected = layout.split(np.fromfile(store.path / CHECKSUMS, "<u8"))
    with from_disk(store.path / BUNDLES) as file:
        for layer, part in enumerate(layout.layers):
            for start, stop in spans(part):
                data = file.read((stop - start) * part.unit.stride)
                digest.update(data)
                found = checksums(np.frombuffer(data, np.uint8).reshape(stop - start, part.unit.stride))
                wrong = np.flatnonzero(found != expected[layer][start:stop])
                if wrong.size:
                    raise StoreCorrupt(damaged_unit(store, layer, start + int(wrong[0])))
                report(BUNDLES, layout.offset(layer, stop), layout.total_bytes)
    if digest.hexdigest() != store.identity:
        raise StoreCorrupt(damaged_file(store, BUNDLES))
