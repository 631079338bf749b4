"""The resident tensors of a store, read once into aligned memory of their own dtype."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import StoreError
from storage.families.architecture import Architecture
from storage.format import CARRIER, ITEMSIZE, RESIDENT, Store

_ALIGNMENT = 64  # bytes of a cache line; a vector load that crosses one counts twice
_CHUNK = 64 << 20  # bytes read, and then dropped from the page cache, at once
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

LARGEST_HALF = 65_504.0


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
        for name, (dtype, shape, raw) in _read(store.path / RESIDENT).items():
            if len(shape) == 1:
                self._vectors[name] = widen(raw.view(CARRIER[dtype]), dtype)
            elif dtype != self.dtype:
                raise StoreError(f"{store.path / RESIDENT} holds {name} as {dtype}, not {self.dtype}")
            else:
                self._matrices[name] = raw.view(CARRIER[dtype]).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in (*self._matrices.values(), *self._vectors.values()))

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


def widen(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """A float32 copy of an array of `dtype`'s carrier."""
    if dtype == "float32":
        return array.astype(np.float32)
    if dtype == "float16":
        return array.view(np.float16).astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow(array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """`array` rounded to `dtype`, in its carrier; what is beyond float16's range becomes its largest."""
    if dtype == "float32":
        return array
    if dtype == "float16":
        return np.clip(array, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).view(np.uint16)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _read(path: Path) -> dict[str, tuple[str, list[int], npt.NDArray[np.uint8]]]:
    """name → dtype, shape, bytes. Read rather than mapped, so that the page cache keeps no second copy."""
    tensors = {}
    with open(path, "rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except (ValueError, MemoryError, OverflowError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        start = 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = _NAMES.get(entry["dtype"])
            if dtype is None:
                raise StoreError(f"{path} holds {name} as {entry['dtype']}, which is not supported")
            first, last = entry["data_offsets"]
            if last - first != ITEMSIZE[dtype] * int(np.prod(entry["shape"])):
                raise StoreError(f"{path} is damaged: {name} has a wrong size")
            tensors[name] = (dtype, entry["shape"], _read_bytes(file.fileno(), start + first, last - first))
    return tensors


def _read_bytes(descriptor: int, offset: int, size: int) -> npt.NDArray[np.uint8]:
    memory = aligned(size)
    done = 0
    while done < size:
        count = os.preadv(descriptor, [memory[done : done + _CHUNK].data], offset + done)
        if count == 0:
            raise StoreError(f"{RESIDENT} ends before its last tensor")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
        done += count
    return memory
