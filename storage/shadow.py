"""A store's shadow: a copy of every FFN matrix in few bits, which stays in memory. FORMAT.md, "The shadow".

A model without zeros needs every neuron. Its shadow serves them all, and the few that count most for a token
get their full rows from flash instead. Of every neuron there is also the length of its full down row: an
activation times that length is how much the neuron can add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from storage import files
from storage.architecture import layer as layer_part
from storage.bundles import BLOCK_BYTES
from storage.codecs import CODECS, F32, FLOATS
from storage.convert.recipe import unit_width
from storage.errors import StoreCorrupt, StoreError, UsageError, reason
from storage.header import header_bytes
from storage.layout import Row, Unit
from storage.store import Store
from storage.tensors import Tensors, codecs_text

NAME, KIND = "shadow", "shadow"  # the file's in `predictors/`, and what its metadata say
CODEC_OF = {4: "q4", 8: "q8"}  # by bits
_LINE = 64  # bytes of a cache line: units in memory start there
_VALUES = 1 << 22  # rounded at once
_UNKNOWN = "0" * 32  # as long as a hash
Progress = Callable[[int, int], None]  # bytes done, and in all


def path_of(store: Store) -> Path:
    """Where the shadow of a store is, or would be."""
    return store.predictors(NAME)


@dataclass(frozen=True, slots=True)
class Shadow:
    """A shadow's file, opened and checked; its rows are read by layers."""

    store: Store
    file: Tensors

    @classmethod
    def open(cls, store: Store) -> Shadow:
        """Raises StoreError where there is none, for a damaged one, and for one of other weights."""
        path = path_of(store)
        if not path.is_file():
            raise StoreError(f"{store.path} has no shadow: make one with `run.py shadow {store.path}`")
        file = Tensors(path)
        if file.metadata.get("kind") != KIND:
            raise StoreError(f"{path} is no shadow")
        if file.metadata.get("store") != store.identity:
            raise StoreError(f"{path} is of other weights: make it again with `run.py shadow {store.path}`")
        found = cls(store, file)
        for index, part in enumerate(store.layout.layers):
            for row in part.unit.rows:
                if file.place(_name(index, row.role)).dtype != found.codec:
                    raise StoreError(f"{path} has several codecs")
        return found

    @property
    def codec(self) -> str:
        """Of all rows."""
        return next(place.dtype for place in self.file.places.values() if place.dtype not in FLOATS)

    def unit(self, layer: int) -> Unit:
        """How low-bit rows lie in memory: as in a store of so many bits."""
        return _unit(self.store, layer, self.codec)

    def units(self, layer: int) -> int:
        return self.store.layout.layers[layer].units // self.unit(layer).width

    @property
    def bytes(self) -> int:
        """In memory."""
        layers = enumerate(self.store.layout.layers)
        return sum(
            self.units(index) * self.unit(index).stride + part.units * np.dtype(np.float32).itemsize
            for index, part in layers
        )

    def read(self, layer: int, memory: npt.NDArray[np.uint8]) -> F32:
        """Put a layer's rows into `memory` [units, stride]; returns the full down rows' lengths [neurons]."""
        unit, units = self.unit(layer), self.units(layer)
        for row in unit.rows:
            count, _ = unit.shape(row.role)
            rows = self.file.read(_name(layer, row.role), (units * count, unit.row_bytes(row.role) // count))
            unit.view(memory, row.role).values[:] = rows.reshape(units, -1)
        return self.file.vector(_name(layer, "norm"), (self.store.layout.layers[layer].units,))


def _name(layer: int, part: str) -> str:
    return layer_part(layer, part)


def check(store: Store, bits: int) -> str:
    """The codec of a shadow in so many bits. Raises UsageError for a store that cannot have it."""
    if bits not in CODEC_OF:
        raise UsageError(f"a shadow has 4 or 8 bits, not {bits}")
    name = store.manifest.name
    if store.architecture.mixture:
        raise UsageError(f"{name} is a mixture of experts, which reads few of its units: it needs no shadow")
    codec = CODECS[CODEC_OF[bits]]
    for part in store.layout.layers:
        if any(row.codec not in FLOATS for row in part.unit.rows) or part.unit.width > 1:
            raise UsageError(f"{name} has few bits already: a shadow is for a store of 16 bits")
        if not codec.fits(part.unit.d_model):
            raise UsageError(
                f"rows of {part.unit.d_model} values, as those of {name}, cannot be written in {bits} bits"
            )
    return codec.name


def write(store: Store, bits: int, progress: Progress = lambda done, total: None) -> Path:
    """Make a store's shadow, or make it again; returns its file.

    Raises UsageError as `check` does, StoreError for a store that cannot be written.
    """
    codec, path = check(store, bits), path_of(store)
    tensors = list(_tensors(store, codec))
    metadata = {
        "kind": KIND,
        "store": store.identity,
        **codecs_text((name, dtype) for name, dtype, _ in tensors),
    }
    try:
        path.parent.mkdir(exist_ok=True)
        with files.replacing(path, shared=True) as file:
            head = header_bytes(tensors, {**metadata, "xxh3_128": _UNKNOWN})
            file.write(head)
            digest = xxhash.xxh3_128()
            for data in _values(store, codec, progress):
                digest.update(data)
                file.write(data)
            file.seek(0)
            file.write(header_bytes(tensors, {**metadata, "xxh3_128": digest.hexdigest()}))
            assert file.tell() == len(head), "the header has grown"
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {reason(error)}") from error
    return path


def _unit(store: Store, layer: int, codec: str) -> Unit:
    full = store.layout.layers[layer].unit
    width = unit_width(store.architecture.layers[layer].ffn, low=True)
    return Unit(tuple(Row(row.role, codec) for row in full.rows), width, full.d_model, _LINE)


def _tensors(store: Store, codec: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, codec and shape of everything in the file, in its order."""
    for index, part in enumerate(store.layout.layers):
        unit = _unit(store, index, codec)
        for row in unit.rows:
            count, width = unit.shape(row.role)
            yield _name(index, row.role), codec, (part.units // unit.width * count, width)
        yield _name(index, "norm"), "float32", (part.units,)


def _values(store: Store, codec: str, progress: Progress) -> Iterator[bytes | memoryview]:
    """The same tensors' bytes."""
    for index, part in enumerate(store.layout.layers):
        units, width = store.read_layer(index), _unit(store, index, codec).width
        lengths = np.empty(part.units, np.float32)
        step = max(1, _VALUES // (part.unit.d_model * width)) * width
        for row in part.unit.rows:
            for start in range(0, part.units, step):
                values = part.unit.view(units[start : start + step], row.role).widened()
                if row.role == "down":
                    lengths[start : start + step] = np.linalg.norm(values, axis=1)
                    if width > 1:
                        values = _by_output(values, width)
                yield CODECS[codec].narrow(values).data
        yield lengths.astype("<f4").data.cast("B")
        progress(part.start + part.bytes, store.layout.total_bytes)


def _by_output(down: F32, width: int) -> F32:
    """Columns as a wider unit has them: [units · d_model, width] from [neurons, d_model]."""
    units = down.reshape(-1, width, down.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(units).reshape(-1, width)


def verify(store: Store, progress: Progress = lambda done, total: None) -> None:
    """Read the shadow again, where there is one. Raises StoreCorrupt; StoreError as `Shadow.open` does."""
    path = path_of(store)
    if not path.is_file():
        return
    file = Shadow.open(store).file
    start, size = min(place.offset for place in file.places.values()), path.stat().st_size
    digest, done = xxhash.xxh3_128(), start
    with files.from_disk(path) as opened:
        opened.seek(start)
        for block in files.blocks(opened, BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            progress(done, size)
    if digest.hexdigest() != file.metadata.get("xxh3_128"):
        raise StoreCorrupt(f"{path} does not match its hash: make it again with `run.py shadow {store.path}`")
