"""The resident tensors of a store, read once into aligned memory of their own dtype."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import StoreError
from storage.families.architecture import Architecture
from storage.floats import widen
from storage.format import CARRIER, RESIDENT, Store
from storage.header import Place
from storage.tensors import Tensors

_ALIGNMENT = 64  # bytes of a cache line; a vector load that crosses one counts twice
_CHUNK = 64 << 20  # bytes read, and then dropped from the page cache, at once


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of uninitialised memory that start at a cache line."""
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    shift = -raw.ctypes.data % _ALIGNMENT
    return raw[shift : shift + size]


class Weights:
    """Matrices stay in the store's dtype; vectors (norms, biases) are widened to float32.

    A tied head is the embedding: one tensor, not two.
    """

    def __init__(self, store: Store) -> None:
        self.architecture: Architecture = store.architecture
        self.dtype = store.layout.dtype
        self._matrices: dict[str, npt.NDArray[Any]] = {}
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}
        file = Tensors(store.path / RESIDENT)
        with open(file.path, "rb", buffering=0) as opened:
            for name in file.names:
                place = file.place(name)
                array = _read(opened.fileno(), place).view(CARRIER[place.dtype])
                if len(place.shape) == 1:
                    self._vectors[name] = widen(array, place.dtype)
                elif place.dtype != self.dtype:
                    raise StoreError(f"{file.path} holds {name} as {place.dtype}, not {self.dtype}")
                else:
                    self._matrices[name] = array.reshape(place.shape)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the file's order within matrices and vectors."""
        return [*self._matrices, *self._vectors]

    def matrix(self, name: str) -> npt.NDArray[Any]:
        """[out, in] of the carrier type."""
        return self._matrices[name]

    def has(self, name: str) -> bool:
        return name in self._matrices or name in self._vectors

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """[n] float32, or empty where the checkpoint has none."""
        return self._vectors.get(name, _NOTHING)


_NOTHING = np.zeros(0, np.float32)


def _read(descriptor: int, place: Place) -> npt.NDArray[np.uint8]:
    """A tensor's bytes. Read rather than mapped, so that the page cache keeps no second copy."""
    memory = aligned(place.bytes)
    done = 0
    while done < place.bytes:
        count = os.preadv(descriptor, [memory[done : done + _CHUNK].data], place.offset + done)
        if count == 0:
            raise StoreError(f"{RESIDENT} ends before its last tensor")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, place.offset + done, count, os.POSIX_FADV_DONTNEED)
        done += count
    return memory
