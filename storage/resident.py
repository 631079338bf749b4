"""Writing `resident.safetensors` as a stream: the header first, then one tensor at a time.

The safetensors library wants all tensors in memory at once, a third of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import xxhash

from storage.checkpoint import Checkpoint
from storage.codecs import CODECS, Carrier
from storage.errors import CheckpointError
from storage.families.family import Resident
from storage.header import header_bytes
from storage.manifest import FileEntry


def header(residents: tuple[Resident, ...], dtype: str) -> bytes:
    """Length and JSON of a safetensors file that holds `residents` in their order."""
    return header_bytes((resident.name, dtype, resident.shape) for resident in residents)


def size(residents: tuple[Resident, ...], dtype: str) -> int:
    """Bytes of the whole file."""
    elements = sum(resident.elements for resident in residents)
    return len(header(residents, dtype)) + CODECS[dtype].size(elements)


def write(
    file: BinaryIO,
    residents: tuple[Resident, ...],
    dtype: str,
    checkpoint: Checkpoint,
    prefix: Callable[[str], str],
    wrote: Callable[[int], None],
) -> FileEntry:
    """Write the whole file; `wrote` hears the bytes so far. `prefix` completes a source's name.

    Raises CheckpointError for what cannot be read, OSError for what cannot be written.
    """
    digest, done = xxhash.xxh3_128(), 0
    for data in _stream(residents, dtype, checkpoint, prefix):
        file.write(data)
        digest.update(data)
        done += len(data)
        wrote(done)
    return FileEntry(done, digest.hexdigest())


def _stream(
    residents: tuple[Resident, ...], dtype: str, checkpoint: Checkpoint, prefix: Callable[[str], str]
) -> Iterator[bytes | memoryview]:
    yield header(residents, dtype)
    for resident in residents:
        for chunk in _chunks(resident, dtype, checkpoint, prefix):
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        checkpoint.release()


def _chunks(
    resident: Resident, dtype: str, checkpoint: Checkpoint, prefix: Callable[[str], str]
) -> Iterator[Carrier]:
    if not resident.sources:
        yield _filled(resident, dtype)
    elif resident.build is None:
        yield from checkpoint.chunks(prefix(resident.sources[0].name))
    else:
        built = resident.build([checkpoint.read(prefix(source.name)) for source in resident.sources])
        if built.shape != resident.shape:
            raise CheckpointError(f"{resident.name} was built as {built.shape}, not {resident.shape}")
        yield built


def _filled(resident: Resident, dtype: str) -> Carrier:
    value = CODECS[dtype].narrow(np.array([resident.fill], np.float32))
    return np.full(resident.shape, value[0], CODECS[dtype].carrier)
