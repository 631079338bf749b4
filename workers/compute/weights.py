"""The resident tensors of a store, read once into aligned memory as they are stored."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from storage.architecture import Architecture, layer
from storage.codecs import CODECS, F32, FLOAT32, Codec, widen
from storage.errors import StoreCorrupt, StoreError
from storage.files import drop_cache, read_once
from storage.header import Place
from storage.layout import Rows
from storage.manifest import RESIDENT
from storage.store import Store
from storage.sums import check_file, damaged_file
from storage.tensors import Tensors

_ALIGNMENT = 64  # bytes of a cache line; a vector load that crosses one counts twice
_CHUNK = 64 << 20  # bytes read, and then dropped from the page cache, at once


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of uninitialised memory that start at a cache line."""
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    shift = -raw.ctypes.data % _ALIGNMENT
    return raw[shift : shift + size]


class Weights:
    """Matrices stay in their codec; vectors (norms, biases) are widened to float32.

    A tied head is the embedding: one tensor, not two.
    """

    def __init__(self, store: Store, verified: bool = False) -> None:
        """With `verified`, what was read is compared with the file's hash. Raises StoreCorrupt, then."""
        self.architecture: Architecture = store.architecture
        self.layout = store.layout
        self._matrices: dict[str, Rows] = {}
        self._vectors: dict[str, F32] = {}
        file, digest = Tensors(store.path / RESIDENT), xxhash.xxh3_128()
        with open(file.path, "rb", buffering=0) as opened:
            places = {name: file.place(name) for name in file.names}  # in the order of their bytes
            digest.update(opened.read(min((one.offset for one in places.values()), default=0)))
            for name, place in places.items():
                codec = CODECS[place.dtype]
                read = _read(opened.fileno(), place)
                if verified:
                    digest.update(read.data)
                array = read.view(codec.carrier)
                if len(place.shape) == 1:
                    self._vectors[name] = codec.widen(array)
                else:
                    self._matrices[name] = Rows.of_matrix(array.reshape(place.shape), codec)

        if verified and digest.hexdigest() != store.manifest.files[RESIDENT].xxh3_128:
            raise StoreCorrupt(damaged_file(store, RESIDENT))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the file's order within matrices and vectors."""
        return [*self._matrices, *self._vectors]

    def matrix(self, name: str) -> Rows:
        """[out, in]."""
        return self._matrices[name]

    def read(self, name: str) -> Rows:
        """The same, which has been read."""
        return self._matrices[name]

    def has(self, name: str) -> bool:
        return name in self._matrices or name in self._vectors

    def vector(self, name: str) -> F32:
        """[n] float32, or empty where the checkpoint has none."""
        return self._vectors.get(name, _NOTHING)

    def lines(self, name: str, which: Any) -> F32:
        """Some lines of a matrix, widened: an embedding's, by token ids or a slice."""
        matrix = self.matrix(name)
        return widen(matrix.values[which], matrix.codec.name)


_NOTHING = np.zeros(0, np.float32)


class Vectors:
    """What `BoundModel` asks of weights, with nothing but vectors in memory."""

    def __init__(self, store: Store, file: Tensors) -> None:
        self.architecture: Architecture = store.architecture
        self.layout = store.layout
        self.file = file
        names = (name for name, place in file.places.items() if len(place.shape) == 1)
        self._vectors = {name: file.vector(name, file.place(name).shape) for name in names}

    @classmethod
    def of(cls, store: Store, verified: bool = False) -> Vectors:
        """With `verified` the file is read and compared with its hash first. Raises StoreCorrupt."""
        if verified:
            check_file(store, RESIDENT)
        return cls(store, Tensors(store.path / RESIDENT))

    def has(self, name: str) -> bool:
        return name in self.file

    def vector(self, name: str) -> F32:
        return self._vectors.get(name, _NOTHING)

    def matrix(self, name: str) -> Rows:
        """The matrix's codec and width, and none of its lines."""
        place = self.file.place(name)
        codec = CODECS[place.dtype]
        return Rows.of_matrix(np.empty((0, place.shape[1]), codec.carrier), codec)

    def read(self, name: str) -> Rows:
        """The whole matrix, read now and not kept."""
        place = self.file.place(name)
        codec = CODECS[place.dtype]
        with open(self.file.path, "rb", buffering=0) as file:
            lines = _read(file.fileno(), place).view(codec.carrier)
        return Rows.of_matrix(lines.reshape(place.shape), codec)

    def lines(self, name: str, which: Any) -> F32:
        """Lines of a matrix, read now and not kept: [lines, width], or [width] of a single one."""
        place = self.file.place(name)
        codec, size = CODECS[place.dtype], place.bytes // place.shape[0]
        numbers = np.arange(place.shape[0])[which]
        with open(self.file.path, "rb", buffering=0) as file:
            read = [os.pread(file.fileno(), size, place.offset + int(line) * size) for line in numbers.flat]
            drop_cache(file.fileno())
        lines = np.frombuffer(b"".join(read), codec.carrier)
        return codec.widen(lines.reshape(*numbers.shape, -1))


def codecs(store: Store) -> tuple[Codec, ...]:
    """Of all matrices and units of a store, each once; nothing but headers is read."""
    places = Tensors(store.path / RESIDENT).places.values()
    found = {place.dtype for place in places if len(place.shape) > 1}
    found |= {row.codec for layer in store.layout.layers for row in layer.unit.rows}
    return tuple(CODECS[name] for name in sorted(found))


def attention_codecs(store: Store) -> tuple[tuple[Codec, ...], ...]:
    """Of the matrices before and behind attention and of the router, float32 without one, each three once.

    Nothing but headers is read.
    """
    file, found = Tensors(store.path / RESIDENT), set()
    for index in range(len(store.layout.layers)):
        qkv, out, router = (layer(index, f"{one}.weight") for one in ("qkv", "out", "router"))
        last = file.dtype(router) if router in file else FLOAT32.name
        found.add((file.dtype(qkv), file.dtype(out), last))
    return tuple(tuple(CODECS[name] for name in names) for names in sorted(found))


def expert_codecs(store: Store) -> tuple[tuple[Codec, ...], ...]:
    """Of the experts' gate, up and down rows, each three once."""
    found = {
        tuple(layout.unit.codec(role).name for role in ("gate", "up", "down"))
        for layout, one in zip(store.layout.layers, store.architecture.layers, strict=True)
        if one.ffn.router is not None
    }
    return tuple(tuple(CODECS[name] for name in names) for names in sorted(found))


def feeding_codecs(store: Store) -> tuple[tuple[Codec, ...], ...]:
    """Of the units' rows of layers without experts, in their order, each combination once."""
    found = {
        tuple(row.codec for row in layout.unit.rows)
        for layout, one in zip(store.layout.layers, store.architecture.layers, strict=True)
        if layout.units and not one.ffn.mixed
    }
    return tuple(tuple(CODECS[name] for name in names) for names in sorted(found))


def _read(descriptor: int, place: Place) -> npt.NDArray[np.uint8]:
    """A tensor's bytes. Read rather than mapped, so that the page cache keeps no second copy."""
    memory = aligned(place.bytes)
    done = 0
    while done < place.bytes:
        count = read_once(descriptor, memory[done : done + _CHUNK].data, place.offset + done)
        if count == 0:
            raise StoreError(f"{RESIDENT} ends before its last tensor")
        done += count
    return memory
