"""The baseline: every weight is read from flash for every token, one after another, as fast as it goes.

Nothing stays in DRAM but vectors (norms, biases), the keys and values, and `DEPTH` buffers. Large direct
reads run ahead of the kernels, over the end of a token as well, since the order never changes. The
mathematics is the ring's own (`compute/blocks.py`, `compute/cpu/token.py`), over every neuron.

`python -m workers.lab.bench.naive STORE --tokens FILE --position N` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline import ending
from pipeline.cores import thread_count
from pipeline.ring.memory import proportional_bytes
from storage.architecture import PROJECT_IN
from storage.codecs import F32
from storage.errors import StoreError, UsageError
from storage.files import open_direct
from storage.layout import Rows
from storage.manifest import BUNDLES, RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers import kernels
from workers.compute import blocks
from workers.compute.blocks import run
from workers.compute.bound import Linear
from workers.compute.cpu.device import CpuDevice
from workers.compute.cpu.norms import norm_queries_and_keys
from workers.compute.cpu.token import TokenOperations
from workers.compute.device import Device
from workers.compute.weights import Vectors
from workers.lab.bench.stream import Stream, pieces
from workers.routing import Ids


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

    def onward(self, index: int, x: F32) -> tuple[F32, F32]:
        return blocks.onward(self.architecture.layers[index], self, index, x)

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

    def __init__(self, store: Store, device: Device[Any], stream: Stream) -> None:
        self._layout, self._order = store.layout, store.order()
        self._device, self._stream = device, stream

    def announce(self, index: int, hidden: Any) -> None:
        """Nobody listens."""

    def routed(self, index: int, ids: Ids) -> None:
        """Nobody listens."""

    def ffn(self, index: int, ffn_input: Any) -> Any:
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

    def remember(self) -> None:
        """Put random keys and values in the cache."""
        random = np.random.default_rng(0)
        for cache in (self.cache.keys, self.cache.values):
            for one in cache:
                one[:] = random.standard_normal(one.shape, np.float32)


class Streamed(Device[Any], Protocol):
    """A device whose matrices come out of a stream."""

    def remember(self) -> None:
        """Put random keys and values in the cache."""


class NaiveModel:
    """Decodes tokens by streaming the whole model for each. Use as a context manager."""

    def __init__(self, store: Store, context: int, threads: int, device: str = "cpu") -> None:
        """`device` is a configuration's `compute.device`."""
        self._architecture = store.architecture
        self._files = [_open(store.path / name) for name in (RESIDENT, BUNDLES)]
        resident = Tensors(store.path / RESIDENT)
        order, vectors = pieces(store, resident, *self._files), Vectors(store, resident)
        self.device: Streamed
        if device == "cpu":
            self.stream = Stream(order)
            self.device = StreamedDevice(vectors, context, threads, self.stream)
        else:
            from workers.lab.bench.naive_torch import StreamedTorch, lock_pages

            self.stream = Stream(order, lock=lock_pages if device == "cuda" else lambda buffer: None)
            self.device = StreamedTorch(vectors, context, threads, self.stream, device)
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


def measure(
    store: Store, tokens: Sequence[int], position: int, threads: int, device: str = "cpu"
) -> dict[str, Any]:
    """Decode `tokens`, the first at `position`, and say what each cost.

    The keys and values before `position` are random numbers: attention's cost does not depend on them.
    """
    if device == "cpu":
        kernels.warm(store.layout.unit.codec("up"), store.architecture)
    context = position + len(tokens)
    with NaiveModel(store, context, threads, device) as model:
        model.device.remember()
        model.forward(tokens[0], position)  # the first token warms up
        stream, before = model.stream, model.device.counters()
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
        count, after = max(1, len(seconds)), model.device.counters()

        def per_token(name: str) -> float:
            return (after.get(name, 0.0) - before.get(name, 0.0)) / count

        return {
            "bus_bytes_per_token": per_token("decode_bus_bytes"),
            "transfer_seconds_per_token": per_token("decode_transfer_seconds"),
            "device_bytes": after.get("device_bytes", 0.0),
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
    parser.add_argument("--device", default="cpu", help="as a configuration's compute.device")
    given = parser.parse_args()
    tokens = [int(word) for word in given.tokens.read_text(encoding="utf-8").split()]
    if len(tokens) < 2:
        raise UsageError(f"{given.tokens} has fewer than two tokens")
    threads = thread_count(given.threads)
    print(json.dumps(measure(Store.open(given.store), tokens, given.position, threads, given.device)))


if __name__ == "__main__":
    sys.exit(ending.exit_status(main))
