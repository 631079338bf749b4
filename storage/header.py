"""The header of a safetensors file, read and written here; tensors are then read by their places.

The library maps a file or holds all of its tensors, and orders metadata by a hash that differs from process
to process. A model larger than memory is read and written one tensor at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.codecs import CODECS

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
BYTES = "U8"  # of rows in few bits; metadata say which format they have
_LENGTH = struct.Struct("<Q")
_LIMIT = 100 << 20  # bytes; the format's own
_ALIGNMENT = 8  # bytes; of the tensors' beginning


class BadHeader(ValueError):
    """A file that is not what it should be; the text goes on from the file's name."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is, and as what."""

    dtype: str  # float32, float16, bfloat16, or the file's own word for anything else
    shape: tuple[int, ...]
    offset: int  # of the first byte, in the file
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """Everything but the tensors."""

    places: dict[str, Place]  # in the file's order
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Raises BadHeader, and OSError."""
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
            if not 2 <= length <= min(_LIMIT, size - _LENGTH.size):
                raise BadHeader("is truncated or not a safetensors file (its header does not fit)")
            text = file.read(length)
        try:
            entries = json.loads(text)
            metadata = entries.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("metadata that are no text")
            places = {name: _place(_LENGTH.size + length, entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadHeader("has a damaged safetensors header") from error
        for name, place in places.items():
            if place.offset + place.bytes > size:
                raise BadHeader(f"is truncated ({name} ends beyond the end of the file)")
        return cls(places, metadata)


def _place(base: int, entry: dict[str, Any]) -> Place:
    """Raises ValueError, KeyError or TypeError for an entry that makes no sense."""
    start, end = entry["data_offsets"]
    shape = tuple(int(extent) for extent in entry["shape"])
    dtype = DTYPES.get(entry["dtype"], str(entry["dtype"]))
    if not 0 <= start <= end or min(shape, default=0) < 0 or entry["dtype"] in CODECS:
        raise ValueError("no such place")
    each = 1 if dtype == BYTES else CODECS[dtype].bytes if dtype in CODECS else None
    if each is not None and end - start != each * math.prod(shape):
        raise ValueError("another size than the shape's")
    return Place(dtype, shape, base + start, end - start)


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and JSON for tensors (name, dtype, shape of the values) that follow one another."""
    items: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + CODECS[dtype].size(math.prod(shape))
        stored = list(shape)
        if CODECS[dtype].grouped is not None:
            stored[-1] = CODECS[dtype].elements(shape[-1])
        items[name] = {
            "dtype": _NAMES.get(dtype, BYTES),
            "shape": stored,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(items, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text
