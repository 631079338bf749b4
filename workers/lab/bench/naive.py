"""The baseline: every weight is read from flash for every token, one after another, as fast as it goes.

Nothing stays in DRAM but vectors (norms, biases), the keys and values, and `DEPTH` buffers. Large direct
reads run ahead of the kernels, over the end of a token as well, since the order never changes. The
mathematics is the ring's own (`compute/blocks.py`, `compute/cpu/token.py`), over every neuron.

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
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import ending
from pipeline.cores import thread_count
from pipeline.ring.memory import proportional_bytes
from storage.architecture import EMBED, HEAD, PROJECT_IN, PROJECT_OUT, Layer, layer
from storage.codecs import F32
from storage.errors import StoreCorrupt, StoreError, UsageError
from storage.files import open_direct
from storage.layout import Rows
from storage.manifest import BUNDLES, RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers import kernels
from workers.compute.blocks import run
from workers.compute.bound import Linear
from workers.compute.cpu.device import CpuDevice
from workers.compute.cpu.norms import norm_queries_and_keys
from workers.compute.cpu.token import TokenOperations
from workers.compute.weights import Vectors
from workers.routing import Ids

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


class StreamedOperations(TokenOperations):
    """One token's operations, with every matrix out of the stream."""

    def __init__(self, vectors: Vectors, stream: Stream, *others: Any) -> None:
        super().__init__(*others)
        self.vectors, self.stream = vectors, stream

    def attention(self, index: int, x: F32) -> F32:
        """In three launches: the stream brings one matrix after the other."""
        attention, bound = self.architecture.layers[index].attention, self.model.layers[index]
        cos, sin = self.positions.rotary[index]
        projected = self._product(bound.qkv, x[0])
        norm_queries_and_keys(attention, bound, projected[None])
        mixed = kernels.attend(
            projected,
            cos[self.first],
            sin[self.first],
            self.cache.keys[index],
            self.cache.values[index],
            self.first,
            attention.scale,
            self.positions.bias[index],
            self.scores[: attention.heads],
            self.cache.codec,
            self.threads,
            attention.window,
            attention.softcap,
            bound.sinks,
        )
        return self._product(bound.out, mixed)[None]

    def _product(self, linear: Linear, x: F32) -> F32:
        place = self.vectors.file.place(linear.name)
        if linear.name == PROJECT_IN:  # before the token's stream begins
            matrix = Rows.of_matrix(self.vectors.file.read(linear.name), linear.weight.codec)
            return kernels.matvec(matrix, x, self.threads, linear.bias)
        out: list[F32] = []
        while sum(part.size for part in out) < place.shape[0]:
            for piece, lines in self.stream.take():
                if piece.name != linear.name:
                    raise RuntimeError(f"{piece.name} came where {linear.name} was expected")
                some = Rows.of_matrix(lines.view(linear.weight.codec.carrier), linear.weight.codec)
                out.append(kernels.matvec(some, x, self.threads))
        y = np.concatenate(out)
        return y + linear.bias if linear.bias.size else y


class StreamedUnits:
    """Every unit of a layer, out of the stream: `blocks.Units`."""

    def __init__(self, store: Store, device: StreamedDevice, stream: Stream) -> None:
        self._layout, self._order = store.layout, store.order()
        self._device, self._stream = device, stream

    def announce(self, index: int, hidden: F32) -> None:
        """Nobody listens."""

    def routed(self, index: int, ids: Ids) -> None:
        """Nobody listens."""

    def ffn(self, index: int, ffn_input: F32) -> F32:
        ffn = self._device.ffn(index, ffn_input)
        done = 0
        while done < self._layout.layers[index].units:
            for piece, units in self._stream.take():
                slots = np.arange(piece.lines, dtype=np.int32)
                positions = slots + np.int32(piece.first)
                ids = positions if self._order is None else self._order[index][positions]
                ffn.add(ids, slots, units)
                ffn.close()
                done += piece.lines
        return ffn.finish()


class StreamedDevice(CpuDevice):
    """The CPU, one token at a time, with every matrix out of a stream."""

    def __init__(self, vectors: Vectors, context: int, threads: int, stream: Stream) -> None:
        super().__init__(vectors, context, threads, token=partial(StreamedOperations, vectors, stream))


class NaiveModel:
    """Decodes tokens by streaming the whole model for each. Use as a context manager."""

    def __init__(self, store: Store, context: int, threads: int) -> None:
        self._architecture = store.architecture
        self._files = [_open(store.path / name) for name in (RESIDENT, BUNDLES)]
        resident = Tensors(store.path / RESIDENT)
        self.stream = Stream(pieces(store, resident, *self._files))
        self.device = StreamedDevice(Vectors(store, resident), context, threads, self.stream)
        self._units = StreamedUnits(store, self.device, self.stream)

    def forward(self, token: int, position: int) -> F32:
        """Logits [vocabulary] after `token`, whose predecessors' keys and values are in the cache."""
        self.device.begin(position, 1, every=False)
        x = self.device.embed(np.array([token]))
        x = run(self._architecture, self.device, x, self._units)
        logits: F32 = self.device.logits(x)[0]
        return logits

    def __enter__(self) -> NaiveModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.__exit__()
        self.device.close()
        for file in self._files:
            os.close(file)


def _open(path: Path) -> int:
    try:
        return open_direct(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error


def measure(store: Store, tokens: Sequence[int], position: int, threads: int) -> dict[str, Any]:
    """Decode `tokens`, the first at `position`, and say what each cost.

    The keys and values before `position` are random numbers: attention's cost does not depend on them.
    """
    kernels.warm(store.layout.unit.codec("up"), store.architecture)
    context = position + len(tokens)
    with NaiveModel(store, context, threads) as model:
        random = np.random.default_rng(0)
        for cache in (model.device.cache.keys, model.device.cache.values):
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
