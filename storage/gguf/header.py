"""What stands in a GGUF file before its tensors: metadata, and the table of tensors.

Read here and not by the package's GGUFReader, which believes every count and length in the file: a damaged
one keeps it busy without end. Here nothing is read beyond the file, nor beyond LARGEST_HEADER, and every
list is bounded. The table of types and block sizes is the package's.

Little-endian, versions 2 and 3 (ggml-org/ggml, docs/gguf.md). Shapes are given rows first, as numpy has them;
the file has them the other way round.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from storage.errors import CheckpointError, UnsupportedModel, reason

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32  # bytes
LARGEST_HEADER = 128 << 20  # bytes; a vocabulary of 262,144 tokens and its merges need about 20 MB
MOST_ELEMENTS = 4 << 20  # of one list
MOST_TENSORS = 1 << 17
MOST_DIMENSIONS = 4  # ggml's own

SCALARS = {  # type number -> struct's letter
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as it lies in a file."""

    name: str
    path: Path
    kind: str  # ggml's name of the type: F32, Q4_K …
    shape: tuple[int, ...]  # rows first
    offset: int  # of the first byte, in the file

    @property
    def known(self) -> bool:
        """Whether the type is one whose blocks are known."""
        return self.kind in GGMLQuantizationType.__members__

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.columns // block * size


@dataclass(frozen=True, slots=True)
class Header:
    """Everything but the tensors."""

    metadata: dict[str, Any]  # lists of numbers as numpy arrays, lists of strings as lists
    tensors: tuple[Packed, ...]
    digest: str  # of the header's bytes

    @classmethod
    def read(cls, path: Path) -> Header:
        """Raises CheckpointError, and UnsupportedModel for another version or byte order."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                return _read(_Bytes(file, size), path, size)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
        except _Damaged as error:
            raise CheckpointError(f"{path} is truncated or no sound GGUF file: {error}") from error


class _Damaged(ValueError):
    """Something that a sound file does not have; the text says what."""


class _Bytes:
    """The file's bytes from the beginning, no more than there are and no more than a header has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._end = min(size, LARGEST_HEADER)
        self.position = 0
        self.digest = xxhash.xxh3_128()

    def take(self, count: int) -> bytes:
        if count > self._end - self.position:
            raise _Damaged("its header ends beyond the end of the file, or is larger than a header can be")
        data = self._file.read(count)
        if len(data) != count:
            raise _Damaged("its header ends beyond the end of the file")
        self.position += count
        self.digest.update(data)
        return data

    def number(self, letter: str) -> Any:
        form = _FORMS[letter]
        return form.unpack(self.take(form.size))[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise _Damaged("a text in its header is not UTF-8") from None


_FORMS = {letter: struct.Struct(f"<{letter}") for letter in SCALARS.values()}


def _read(source: _Bytes, path: Path, size: int) -> Header:
    if source.take(len(MAGIC)) != MAGIC:
        raise _Damaged("it does not begin with the letters GGUF")
    version = source.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "a big-endian GGUF file" if swapped in VERSIONS else f"GGUF version {version}"
        raise UnsupportedModel(f"{path} is {what}; supported are little-endian files of versions 2 and 3")
    tensor_count, pair_count = source.number("Q"), source.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):  # each takes bytes, so this ends with the file
        key = source.text()
        if key in metadata:
            raise _Damaged(f"its header has {key[:80]!r} twice")
        metadata[key] = _value(source, source.number("I"))
    if tensor_count > MOST_TENSORS:
        raise _Damaged(f"its header promises {tensor_count} tensors")
    table = [_row(source) for _ in range(tensor_count)]
    base = _aligned(source.position, metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT))
    tensors = tuple(Packed(name, path, kind, shape, base + offset) for name, kind, shape, offset in table)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Damaged("it has two tensors of one name")
    for tensor in tensors:
        _check_place(tensor, size)
    return Header(metadata, tensors, source.digest.hexdigest())


def _value(source: _Bytes, kind: int) -> Any:
    if kind == STRING:
        return source.text()
    if kind in SCALARS:
        return source.number(SCALARS[kind])
    if kind != ARRAY:
        raise _Damaged(f"its header has a value of the unknown type {kind}")
    element, count = source.number("I"), source.number("Q")
    if count > MOST_ELEMENTS:
        raise _Damaged(f"its header has a list of {count} elements")
    if element == STRING:
        return [source.text() for _ in range(count)]
    if element not in SCALARS:
        raise _Damaged(f"its header has a list of the type {element}")
    form = np.dtype(f"<{SCALARS[element]}" if SCALARS[element] != "?" else "?")
    return np.frombuffer(source.take(count * form.itemsize), form)


def _row(source: _Bytes) -> tuple[str, str, tuple[int, ...], int]:
    """Name, type, shape and offset of a tensor."""
    name, dimensions = source.text(), source.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise _Damaged(f"the tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(source.number("Q") for _ in range(dimensions))[::-1]
    if not shape or min(shape) == 0:
        raise _Damaged(f"the tensor {name[:80]!r} is empty")
    kind, offset = source.number("I"), source.number("Q")
    return name, _kind_name(kind), shape, offset


def _kind_name(kind: int) -> str:
    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind}"  # newer than the package, or no type at all: refused where it is read


def _aligned(position: int, alignment: Any) -> int:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise _Damaged(f"its alignment is {alignment!r}, which is no power of two")
    return position + -position % alignment


def _check_place(tensor: Packed, size: int) -> None:
    if not tensor.known:
        return
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
    if tensor.columns % block:
        raise _Damaged(
            f"the rows of {tensor.name[:80]!r} have {tensor.columns} values, which are no whole blocks of "
            f"{tensor.kind}"
        )
    if tensor.offset + tensor.rows * tensor.row_bytes > size:
        raise _Damaged(f"{tensor.name[:80]!r} ends beyond the end of the file")


@dataclass(frozen=True, slots=True)
class Metadata:
    """Metadata with their types checked. `default` None means that the key must be there."""

    path: Path
    values: dict[str, Any]

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number, not negative; a list of equal ones counts as one."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        elif isinstance(value, np.ndarray):
            raise UnsupportedModel(f"{self.path}: layers that differ in {key} are not supported")
        good = self._checked(key, value, lambda value: type(value) is int and value >= 0, "a whole number")
        return int(good)

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        return float(
            self._checked(
                key, value, lambda value: type(value) in {int, float} and math.isfinite(value), "a number"
            )
        )

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        return bool(self._checked(key, value, lambda value: type(value) is bool, "true or false"))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        return str(self._checked(key, value, lambda value: type(value) is str, "a text"))

    def texts(self, key: str) -> list[str]:
        found: list[str] = self._checked(
            key,
            self.values.get(key),
            lambda value: isinstance(value, list) or (isinstance(value, np.ndarray) and not value.size),
            "a list of texts",
        )
        return list(found)

    def numbers(self, key: str, count: int) -> np.ndarray[Any, Any]:
        """A list of `count` numbers."""
        found: np.ndarray[Any, Any] = self._checked(
            key,
            self.values.get(key),
            lambda value: isinstance(value, np.ndarray) and value.size == count,
            f"a list of {count} numbers",
        )
        return found

    def has(self, key: str) -> bool:
        return key in self.values

    def _checked(self, key: str, value: Any, good: Callable[[Any], bool], what: str) -> Any:
        if value is None:
            raise CheckpointError(f"{self.path} lacks {key} among its metadata")
        if not good(value):
            raise CheckpointError(f"{self.path}: {key} must be {what}, not {str(value)[:80]}")
        return value
