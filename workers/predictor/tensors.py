"""Reading single tensors of a safetensors file in the types that kernels take.

16-bit floats come as uint16, which is what numba can hold (and numpy has no bfloat16).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import StoreError

F32 = npt.NDArray[np.float32]

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CARRIER: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100 << 20  # bytes; the format's own limit


class Tensors:
    """The header of one file; tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError for a file that is missing or not of this format."""
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                if length > _LARGEST_HEADER:
                    raise ValueError("its header is too long")
                header: dict[str, Any] = json.loads(file.read(length))
        except FileNotFoundError:
            raise StoreError(f"{path} does not exist") from None
        except (OSError, ValueError, struct.error) as error:
            raise StoreError(f"{path} is not a safetensors file: {error}") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = header
        self._start = _LENGTH.size + length

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def dtype(self, name: str) -> str:
        """As the kernels name it. Raises StoreError for any that they do not take."""
        found = self._entries[name]["dtype"]
        if found not in DTYPES:
            raise StoreError(f"{self.path} holds {name} as {found}, which is not supported")
        return DTYPES[found]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        """A tensor in its carrier type. Raises StoreError when it is absent or has not this shape."""
        if name not in self._entries:
            raise StoreError(f"{self.path} lacks {name}")
        entry = self._entries[name]
        self.dtype(name)
        if shape is not None and tuple(entry["shape"]) != shape:
            raise StoreError(f"{self.path} holds {name} as {tuple(entry['shape'])}, not {shape}")
        begin, end = entry["data_offsets"]
        kind = np.dtype(_CARRIER[entry["dtype"]])
        data = np.fromfile(self.path, kind, (end - begin) // kind.itemsize, offset=self._start + begin)
        try:
            return data.reshape(entry["shape"])
        except ValueError:
            raise StoreError(f"{self.path} is shorter than its header says") from None

    def vector(self, name: str, shape: tuple[int, ...]) -> F32:
        """A tensor widened to float32."""
        return widen(self.read(name, shape), self.dtype(name))


def widen(array: npt.NDArray[Any], dtype: str) -> F32:
    """The values of a carrier array of `dtype`."""
    if dtype == "float16":
        return array.view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
