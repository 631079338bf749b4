"""Single tensors of a store's safetensors files, in the types that kernels take.

16-bit floats come as uint16, which is what numba can hold (and numpy has no bfloat16). Rows in few bits come
as bytes; the file's metadata name their codecs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.codecs import CODECS, F32, FLOATS, widen
from storage.errors import StoreError, reason
from storage.header import BYTES, BadHeader, Header, Place

_CODECS = "codecs"  # of a resident file's metadata: JSON, from a tensor's name to its codec's


class Tensors:
    """The header of one file; tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError for a file that is missing or not of this format."""
        self.path = path
        try:
            header = Header.read(path)
        except FileNotFoundError:
            raise StoreError(f"{path} does not exist") from None
        except BadHeader as error:
            raise StoreError(f"{path} is damaged: it {error}") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {reason(error)}") from error
        self.metadata = header.metadata
        self.places: dict[str, Place] = dict(header.places)
        try:
            self.places |= _grouped(header)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path} is damaged: its codecs cannot be read") from error

    def __contains__(self, name: str) -> bool:
        return name in self.places

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def place(self, name: str) -> Place:
        """Raises StoreError for a tensor that is absent, or of a dtype that kernels do not take."""
        if name not in self.places:
            raise StoreError(f"{self.path} lacks {name}")
        place = self.places[name]
        if place.dtype not in CODECS:
            raise StoreError(f"{self.path} holds {name} as {place.dtype}, which is not supported")
        return place

    def dtype(self, name: str) -> str:
        """As the kernels name it. Raises StoreError like `place`."""
        return self.place(name).dtype

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        """A tensor in its carrier type. Raises StoreError when it is absent or has not this shape."""
        place = self.place(name)
        if shape is not None and place.shape != shape:
            raise StoreError(f"{self.path} holds {name} as {place.shape}, not {shape}")
        kind = np.dtype(CODECS[place.dtype].carrier)
        return np.fromfile(self.path, kind, place.elements, offset=place.offset).reshape(place.shape)

    def vector(self, name: str, shape: tuple[int, ...]) -> F32:
        """A tensor widened to float32."""
        return widen(self.read(name, shape), self.dtype(name))


def codecs_text(tensors: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The metadata that name the codecs of rows in few bits; nothing where all are floats."""
    named = {name: dtype for name, dtype in tensors if dtype not in FLOATS}
    return {_CODECS: json.dumps(named, separators=(",", ":"))} if named else {}


def _grouped(header: Header) -> dict[str, Place]:
    """The tensors whose codecs the metadata name. Raises ValueError and others for what makes no sense."""
    found = {}
    for name, codec in json.loads(header.metadata.get(_CODECS, "{}")).items():
        place, known = header.places[name], CODECS[codec]
        if place.dtype != BYTES or len(place.shape) != 2 or known.grouped is None:
            raise ValueError(name)
        width, rest = divmod(place.shape[1], known.bytes)
        if rest or not known.fits(width * known.block):
            raise ValueError(name)
        found[name] = replace(place, dtype=codec)
    return found
