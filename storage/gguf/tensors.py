"""Reading a tensor of a GGUF file, some rows at a time: in its own bits (`kept.py`), or widened to floats.

Which floats the values become is the file's question, not the tensor's (`dtype_of`): a store's matrices are
of one dtype. Vectors (norms, biases) are float32 in every file and stay so; so do routers.

- A file whose matrices are all F32, F16 or BF16 keeps that: nothing is lost.
- Anything else becomes float16. A block's value is a whole number of 4 to 8 bits times a scale of 11 bits, so
  either 16-bit type rounds; float16 keeps 11 bits where bfloat16 keeps 8, and its range (6e-8 to 65,504)
  holds every weight a quantised file can hold in practice. What is beyond it becomes its largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from storage.codecs import BFLOAT16, CODECS, FLOAT16, FLOAT32, Carrier, narrow
from storage.errors import CheckpointError
from storage.gguf.header import Packed
from storage.gguf.kept import CODEC, kept
from storage.gguf.names import Restored

FLOATS = {"F32": FLOAT32.name, "F16": FLOAT16.name, "BF16": BFLOAT16.name}
KINDS = (*FLOATS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
CHUNK = 8 << 20  # bytes of float32 widened at once; widening needs a few times as much


def dtype_of(tensors: Iterable[Restored]) -> str:
    """What the matrices are widened to."""
    kinds = {tensor.packed.kind for tensor in tensors if tensor.matrix}
    return FLOATS.get(kinds.pop(), FLOAT16.name) if len(kinds) == 1 else FLOAT16.name


def read(tensor: Restored, dtype: str, start: int = 0, stop: int | None = None) -> Carrier:
    """The tensor, or its lines from `start` up to `stop`, in the codec `dtype`. Raises CheckpointError."""
    packed = tensor.packed
    lines = (packed.shape[0] if stop is None else stop) - start
    inner = packed.shape[1:]
    if inner:
        inner = (*inner[:-1], CODECS[dtype].elements(inner[-1]))
    whole = np.empty((lines, *inner), CODECS[dtype].carrier)
    flat, done = whole.reshape(-1), 0
    for chunk in chunks(tensor, dtype, CHUNK, start, start + lines):
        flat[done : done + chunk.size] = chunk
        done += chunk.size
    return whole


def chunks(
    tensor: Restored, dtype: str, size: int, start: int = 0, stop: int | None = None
) -> Iterator[Carrier]:
    """The elements, flat, in chunks of at most `size` bytes of float32, or of one row."""
    packed = tensor.packed
    stop = packed.shape[0] if stop is None else stop
    if len(packed.shape) == 1:
        values = _widened(_packed_rows(packed, 0, 1), packed.kind).reshape(-1)
        yield _finished((values if tensor.order is None else values[tensor.order])[start:stop], tensor, dtype)
        return
    each = packed.rows // packed.shape[0]  # rows of a line: 1, but for stacked matrices
    step = max(min(size, CHUNK) // (4 * packed.columns), 1)
    whole = None if tensor.order is None else _packed_rows(packed, 0, packed.rows)
    for first in range(start * each, stop * each, step):
        last = min(first + step, stop * each)
        if whole is None or tensor.order is None:
            rows = _packed_rows(packed, first, last)
        else:
            rows = whole[tensor.order[first:last]]
        same = kept(rows, packed.kind) if CODEC.get(packed.kind) == dtype else None
        if same is not None:
            yield same.reshape(-1)
        else:
            yield _finished(_widened(rows, packed.kind), tensor, dtype)


def _finished(values: npt.NDArray[np.float32], tensor: Restored, dtype: str) -> Carrier:
    if tensor.subtracted:
        values = values - np.float32(tensor.subtracted)
    return narrow(np.ascontiguousarray(values), dtype).reshape(-1)


def _widened(rows: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float32]:
    return np.asarray(dequantize(rows, GGMLQuantizationType[kind]), np.float32)


def _packed_rows(packed: Packed, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """[stop - start, bytes of a row] as they lie in the file."""
    count = (stop - start) * packed.row_bytes
    try:
        data = np.fromfile(packed.path, np.uint8, count, offset=packed.offset + start * packed.row_bytes)
    except OSError as error:
        raise CheckpointError(f"{packed.path} cannot be read: {error}") from error
    if data.size != count:
        raise CheckpointError(f"{packed.path} is truncated: {packed.name} ends beyond the end of the file")
    return data.reshape(stop - start, packed.row_bytes)
