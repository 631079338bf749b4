"""Writing `resident.safetensors` as a stream: the header first, then one tensor at a time.

The safetensors library wants all tensors in memory at once, a third of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import xxhash

from storage.codecs import CODECS, F32, Carrier, widen
from storage.errors import CheckpointError
from storage.families.family import Resident, Source
from storage.header import header_bytes
from storage.manifest import FileEntry
from storage.origin import Origin
from storage.tensors import codecs_text

_ROUNDED_AT_ONCE = 1 << 24  # values


@dataclass(frozen=True, slots=True)
class Stored:
    """A resident tensor and the codec that it is stored in: its sources', or one of fewer bits."""

    tensor: Resident
    dtype: str


def header(residents: Sequence[Stored]) -> bytes:
    """Length and JSON of a safetensors file that holds `residents` in their order."""
    metadata = codecs_text((one.tensor.name, one.dtype) for one in residents)
    return header_bytes(
        ((one.tensor.name, one.dtype, one.tensor.shape) for one in residents), metadata or None
    )


def size(residents: Sequence[Stored]) -> int:
    """Bytes of the whole file."""
    return len(header(residents)) + sum(CODECS[one.dtype].size(one.tensor.elements) for one in residents)


def write(
    file: BinaryIO,
    residents: Sequence[Stored],
    checkpoint: Origin,
    prefix: Callable[[str], str],
    wrote: Callable[[int], None],
) -> FileEntry:
    """Write the whole file; `wrote` hears the bytes so far. `prefix` completes a source's name.

    Raises CheckpointError for what cannot be read, OSError for what cannot be written.
    """
    digest, done = xxhash.xxh3_128(), 0
    for data in _stream(residents, checkpoint, prefix):
        file.write(data)
        digest.update(data)
        done += len(data)
        wrote(done)
    return FileEntry(done, digest.hexdigest())


def _stream(
    residents: Sequence[Stored], checkpoint: Origin, prefix: Callable[[str], str]
) -> Iterator[bytes | memoryview]:
    yield header(residents)
    for resident in residents:
        for chunk in _chunks(resident, checkpoint, prefix):
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        checkpoint.release()


def _chunks(stored: Stored, checkpoint: Origin, prefix: Callable[[str], str]) -> Iterator[Carrier]:
    resident, codec = stored.tensor, CODECS[stored.dtype]
    if not resident.sources:
        yield _filled(resident, stored.dtype)
        return
    sources = resident.sources
    kept = all(checkpoint.entry(prefix(source.name)).dtype == stored.dtype for source in sources)
    alone = resident.build is None and sources[0].of is None
    if kept and alone:
        yield from checkpoint.chunks(prefix(sources[0].name))
    elif kept:
        yield built(resident, checkpoint, prefix)
    elif alone:
        name, lines = prefix(sources[0].name), resident.shape[0]
        step = max(1, _ROUNDED_AT_ONCE // (resident.elements // lines))
        for start in range(0, lines, step):
            yield codec.narrow(_widened(checkpoint, name, start, min(start + step, lines)))
    else:
        yield codec.narrow(_values(resident, checkpoint, prefix))


def built(resident: Resident, checkpoint: Origin, prefix: Callable[[str], str]) -> Carrier:
    """A resident tensor that has sources of one dtype, whole, as they are. Raises CheckpointError."""
    arrays = [read(checkpoint, source, prefix) for source in resident.sources]
    array = arrays[0] if resident.build is None else resident.build(arrays)
    codec = CODECS[checkpoint.entry(prefix(resident.sources[0].name)).dtype]
    _check(resident, array, (*resident.shape[:-1], codec.elements(resident.shape[-1])))
    return array


def _values(resident: Resident, checkpoint: Origin, prefix: Callable[[str], str]) -> F32:
    """A resident tensor that has sources, whole, as float32. Raises CheckpointError."""
    arrays = [
        _widened(checkpoint, prefix(source.name), source.start, source.start + source.shape[0])
        for source in resident.sources
    ]
    array = arrays[0] if resident.build is None else resident.build(arrays)
    _check(resident, array, resident.shape)
    return array


def _check(resident: Resident, array: Carrier, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise CheckpointError(f"{resident.name} was built as {array.shape}, not {shape}")


def _widened(checkpoint: Origin, name: str, start: int, stop: int) -> F32:
    return widen(checkpoint.read(name, start, stop), checkpoint.entry(name).dtype)


def read(checkpoint: Origin, source: Source, prefix: Callable[[str], str]) -> Carrier:
    """A source's values, in their carrier."""
    return checkpoint.read(prefix(source.name), source.start, source.start + source.shape[0])


def _filled(resident: Resident, dtype: str) -> Carrier:
    value = CODECS[dtype].narrow(np.array([resident.fill], np.float32))
    return np.full(resident.shape, value[0], CODECS[dtype].carrier)
