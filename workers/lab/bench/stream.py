"""The baseline's reads: a model's matrices and units in the order of their use, read ahead for ever."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt

from storage.architecture import EMBED, HEAD, PROJECT_OUT, Layer, layer
from storage.errors import StoreCorrupt
from storage.store import Store
from storage.tensors import Tensors

CHUNK = 8 << 20  # bytes of one read, about
DEPTH = 4  # reads in flight, and buffers
UNIT = 4096  # bytes; direct reads begin and end at its multiples


@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines of a matrix, or some units, and the read that brings them."""

    name: str
    file: int  # descriptor
    start: int  # of the read, in the file
    length: int  # of the read
    skip: int  # bytes before the first line
    first: int  # line, or position of the unit
    lines: int
    line_bytes: int

    @property
    def bytes(self) -> int:
        """Of all lines."""
        return self.lines * self.line_bytes


class Stream:
    """Pieces in a fixed order, read ahead for ever. Use as a context manager."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        depth: int = DEPTH,
        lock: Callable[[mmap.mmap], None] = lambda buffer: None,
    ) -> None:
        """`lock` is given every buffer before its first use."""
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
            lock(buffer)
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

    def take(self) -> Iterator[tuple[Piece, npt.NDArray[np.uint8]]]:
        """The next piece as bytes [lines, line_bytes]; it is overwritten after the iteration."""
        piece, buffer, future = self._under_way.popleft()
        started = time.perf_counter()
        future.result()
        self.waiting_seconds += time.perf_counter() - started
        lines = np.frombuffer(buffer, np.uint8, piece.bytes, piece.skip).reshape(piece.lines, -1)
        yield piece, lines
        del lines
        self._ask(buffer)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def pieces(store: Store, file: Tensors, resident: int, bundles: int) -> list[Piece]:
    """One token's reads, in the order in which its weights are used."""
    found: list[Piece] = []

    def cut(name: str, file: int, start: int, lines: int, line_bytes: int) -> None:
        step = max(1, CHUNK // line_bytes)
        for first in range(0, lines, step):
            count = min(step, lines - first)
            begin = start + first * line_bytes
            end = begin + count * line_bytes
            low, high = begin // UNIT * UNIT, -(-end // UNIT) * UNIT
            found.append(Piece(name, file, low, high - low, begin - low, first, count, line_bytes))

    def matrix(name: str) -> None:
        place = file.place(name)
        cut(name, resident, place.offset, place.shape[0], place.bytes // place.shape[0])

    for index, part in enumerate(store.layout.layers):
        for tensor in _matrices(store.architecture.layers[index]):
            matrix(layer(index, f"{tensor}.weight"))
        cut(f"{index}", bundles, part.start, part.units, part.unit.stride)
    if PROJECT_OUT in file:
        matrix(PROJECT_OUT)
    matrix(EMBED if store.architecture.tied_head else HEAD)
    return found


def _matrices(described: Layer) -> list[str]:
    """A layer's resident matrices, in the order in which they are used."""
    router, shared = described.ffn.router, described.ffn.shared
    found = ["qkv", "out"]
    if router is not None:
        found.insert(0 if router.reads == "layer_input" else 2, "router")
    if shared is not None:
        found += ["shared_gate", "shared_up", "shared_down", *(["shared_switch"] if shared.gated else [])]
    return found
