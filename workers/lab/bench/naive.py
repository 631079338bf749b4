"""The baseline: every weight is read from flash for every token, one after another, as fast as it goes.

Nothing stays in DRAM but vectors (norms, biases), the keys and values, and `DEPTH` buffers. Large direct
reads run ahead of the kernels, over the end of a token as well, since the order never changes. The
mathematics is the ring's own (`blocks.py`, `token.py`), over every neuron.

`python -m workers.lab.bench.naive STORE --tokens FILE --position N` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import ending
from pipeline.cores import thread_count
from pipeline.ring.memory import proportional_bytes
from storage.errors import StoreCorrupt, StoreError, UsageError
from storage.families.architecture import EMBED, HEAD, PROJECT_IN, PROJECT_OUT, layer
from storage.floats import widen
from storage.format import BUNDLES, CARRIER, ITEMSIZE, RESIDENT, Store
from storage.tensors import Tensors
from workers import kernels
from workers.compute.blocks import after_ffn, before_ffn
from workers.compute.token import TokenOperations

CHUNK = 8 << 20  # bytes of one read, about
DEPTH = 4  # reads in flight, and buffers
UNIT = 4096  # bytes; direct reads begin and end at its multiples

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a matrix, or some bundles, and the read that brings them."""

    name: str
    file: int  # descriptor
    start: int  # of the read, in the file
    length: int  # of the read
    skip: int  # bytes before the first row
    first: int  # row, or position of the bundle
    rows: int
    width: int  # elements of a row or bundle
    bytes: int  # of all rows


class Stream:
    """Pieces in a fixed order, read ahead for ever. Use as a context manager."""

    def __init__(self, pieces: Sequence[Piece], depth: int = DEPTH) -> None:
        size = max(piece.length for piece in pieces)
        self._order: Iterator[Piece] = cycle(pieces)
        self._pool = ThreadPoolExecutor(depth, "stream")
        self._under_way: deque[tuple[Piece, mmap.mmap, Future[int]]] = deque()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._since = 0.0
        self.bytes = 0
        self.reads = 0
        self._busy_seconds = 0.0
        self.waiting_seconds = 0.0  # of the consumer
        for _ in range(depth):
            buffer = mmap.mmap(-1, size)
            buffer[:] = b"\0" * size
            self._ask(buffer)

    def _ask(self, buffer: mmap.mmap) -> None:
        piece = next(self._order)
        self._under_way.append((piece, buffer, self._pool.submit(self._read, piece, buffer)))

    def _read(self, piece: Piece, buffer: mmap.mmap) -> int:
        with self._lock:
            self._since = self._since if self._in_flight else time.perf_counter()
            self._in_flight += 1
        done = 0
        with memoryview(buffer) as view:
            while done < piece.skip + piece.bytes:  # a file may end inside the last unit
                with view[done : piece.length] as rest:
                    count = os.preadv(piece.file, [rest], piece.start + done)
                if count == 0:
                    raise StoreCorrupt(f"{piece.name} ends beyond the end of its file")
                done += count
        with self._lock:
            self._in_flight -= 1
            self.bytes += done
            self.reads += 1
            if not self._in_flight:
                self._busy_seconds += time.perf_counter() - self._since
        return done

    @property
    def busy_seconds(self) -> float:
        """Seconds with reads in flight, up to now."""
        with self._lock:
            return self._busy_seconds + (time.perf_counter() - self._since if self._in_flight else 0.0)

    def take(self, dtype: str) -> Iterator[tuple[Piece, npt.NDArray[Any]]]:
        """The next piece as [rows, width] of `dtype`'s carrier; it is overwritten after the iteration."""
        piece, buffer, future = self._under_way.popleft()
        started = time.perf_counter()
        future.result()
        self.waiting_seconds += time.perf_counter() - started
        count = piece.rows * piece.width
        rows = np.frombuffer(buffer, CARRIER[dtype], count, piece.skip).reshape(piece.rows, piece.width)
        yield piece, rows
        del rows
        self._ask(buffer)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def pieces(store: Store, file: Tensors, resident: int, bundles: int) -> list[Piece]:
    """One token's reads, in the order in which its weights are used."""
    itemsize = ITEMSIZE[store.layout.dtype]
    found: list[Piece] = []

    def cut(name: str, file: int, start: int, shape: tuple[int, ...]) -> None:
        rows, width = shape
        step = max(1, CHUNK // (width * itemsize))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            begin = start + first * width * itemsize
            end = begin + count * width * itemsize
            low, high = begin // UNIT * UNIT, -(-end // UNIT) * UNIT
            found.append(Piece(name, file, low, high - low, begin - low, first, count, width, end - begin))

    def matrix(name: str) -> None:
        place = file.place(name)
        cut(name, resident, place.offset, place.shape)

    a, layout = store.architecture, store.layout
    for index in range(a.layers):
        for part in ("qkv", "out"):
            matrix(layer(index, f"{part}.weight"))
        bundle = (layout.d_ff, layout.stride // itemsize)
        cut(f"{index}", bundles, layout.offset(index, 0), bundle)
    if PROJECT_OUT in file:
        matrix(PROJECT_OUT)
    matrix(EMBED if a.tied_head else HEAD)
    return found


class Vectors:
    """What `TokenOperations` asks of weights, with nothing but vectors in memory."""

    def __init__(self, store: Store, file: Tensors) -> None:
        self.architecture = store.architecture
        self.dtype = store.layout.dtype
        self.file = file
        names = (name for name, place in file.places.items() if len(place.shape) == 1)
        self._vectors = {name: widen(self.rows(name, 0, 1)[0], self.dtype) for name in names}

    def rows(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        """Rows of a tensor, read now and forgotten: [count, width]."""
        place = self.file.place(name)
        width = place.shape[-1]
        itemsize = ITEMSIZE[self.dtype]
        with open(self.file.path, "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), count * width * itemsize, place.offset + first * width * itemsize)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return np.frombuffer(raw, CARRIER[self.dtype]).reshape(count, width)

    def matrix(self, name: str) -> Any:
        return _Rows(self, name)

    def has(self, name: str) -> bool:
        return name in self.file

    def vector(self, name: str) -> F32:
        return self._vectors.get(name, np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A matrix of which single rows are read."""

    vectors: Vectors
    name: str

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.vectors.rows(self.name, row, 1)[0]
        return found


class StreamedOperations(TokenOperations):
    """One token's operations, with every matrix out of the stream."""

    def __init__(self, vectors: Vectors, context: int, threads: int, stream: Stream) -> None:
        super().__init__(vectors, context, threads)  # type: ignore[arg-type]
        self._stream = stream

    def _product(self, name: str, x: F32, bias: F32 = kernels.NO_BIAS) -> F32:
        rows = self.weights.file.place(name).shape[0]  # type: ignore[attr-defined]
        if name == PROJECT_IN:  # before the token's stream begins
            matrix = self.weights.rows(name, 0, rows)  # type: ignore[attr-defined]
            return kernels.matvec(matrix, x, self.weights.dtype, self.threads, bias)
        out: list[F32] = []
        while sum(part.size for part in out) < rows:
            for piece, some in self._stream.take(self.weights.dtype):
                if piece.name != name:
                    raise RuntimeError(f"{piece.name} came where {name} was expected")
                out.append(kernels.matvec(some, x, self.weights.dtype, self.threads))
        y = np.concatenate(out)
        return y + bias if bias.size else y

    def ffn(self, index: int, x: F32, order: npt.NDArray[np.int32] | None) -> F32:
        """One layer's FFN over all of its neurons."""
        a = self.architecture
        down_bias = self.weights.vector(layer(index, "down.bias"))
        y = down_bias.copy() if down_bias.size else np.zeros_like(x)
        up_bias = self.weights.vector(layer(index, "up.bias"))
        done = 0
        while done < a.d_ff:
            for piece, bundles in self._stream.take(self.weights.dtype):
                slots = np.arange(piece.rows, dtype=np.int32)
                ids = slots + piece.first if order is None else order[slots + piece.first]
                active = kernels.activate(
                    bundles, ids, slots, x, up_bias, self.weights.dtype, a.activation, self.threads
                )
                kernels.accumulate(bundles, slots, slots, active, y, self.weights.dtype, self.threads)
                done += piece.rows
        return y


class NaiveModel:
    """Decodes tokens by streaming the whole model for each. Use as a context manager."""

    def __init__(self, store: Store, context: int, threads: int) -> None:
        self._store = store
        self._files = [_open(store.path / name) for name in (RESIDENT, BUNDLES)]
        resident = Tensors(store.path / RESIDENT)
        self._orders = store.order()
        self.stream = Stream(pieces(store, resident, *self._files))
        self.operations = StreamedOperations(Vectors(store, resident), context, threads, self.stream)

    def forward(self, token: int, position: int) -> F32:
        """Logits [vocabulary] after `token`, whose predecessors' keys and values are in the cache."""
        a, operations = self._store.architecture, self.operations
        operations.position = position
        x = operations.embed(token)
        for index in range(a.layers):
            residual, ffn_input = before_ffn(a, operations, index, x, lambda _: None)
            order = None if self._orders is None else self._orders[index]
            x = after_ffn(a, operations, index, residual, operations.ffn(index, ffn_input, order))
        return operations.logits(x)

    def __enter__(self) -> NaiveModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.__exit__()
        for file in self._files:
            os.close(file)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error
    except OSError:  # a file system without direct I/O
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def measure(store: Store, tokens: Sequence[int], position: int, threads: int) -> dict[str, Any]:
    """Decode `tokens`, the first at `position`, and say what each cost.

    The keys and values before `position` are random numbers: attention's cost does not depend on them.
    """
    kernels.warm(store.layout.dtype)
    context = position + len(tokens)
    with NaiveModel(store, context, threads) as model:
        random = np.random.default_rng(0)
        for cache in (model.operations.cache.keys, model.operations.cache.values):
            for one in cache:
                one[:] = random.standard_normal(one.shape, np.float32)
        model.forward(tokens[0], position)  # the first token warms up
        stream = model.stream
        bytes_before, reads, busy, waiting = (
            stream.bytes,
            stream.reads,
            stream.busy_seconds,
            stream.waiting_seconds,
        )
        seconds = []
        for number, token in enumerate(tokens[1:], 1):
            started = time.perf_counter()
            model.forward(token, position + number)
            seconds.append(time.perf_counter() - started)
        count = max(1, len(seconds))
        return {
            "token_seconds": seconds,
            "bytes_per_token": (stream.bytes - bytes_before) / count,
            "reads_per_token": (stream.reads - reads) / count,
            "busy_seconds_per_token": (stream.busy_seconds - busy) / count,
            "waiting_seconds_per_token": (stream.waiting_seconds - waiting) / count,
            "memory_bytes": proportional_bytes([os.getpid()]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.lab.bench.naive", description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="file of token ids")
    parser.add_argument("--position", type=int, default=0, help="tokens before the first one")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are CPUs")
    given = parser.parse_args()
    tokens = [int(word) for word in given.tokens.read_text(encoding="utf-8").split()]
    if len(tokens) < 2:
        raise UsageError(f"{given.tokens} has fewer than two tokens")
    threads = thread_count(given.threads)
    print(json.dumps(measure(Store.open(given.store), tokens, given.position, threads)))


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
