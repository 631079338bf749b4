"""What the predictors learn from: FFN inputs and active neurons of every layer, on disk.

Text runs through the dense model layer by layer: a layer's weights are read once, blocks of
sequences pass through it, and the residual stream waits in a file for the next layer. Memory is
that of the resident weights, one layer and one block; the disk holds, per token,
`layers · (2 · d_model + d_ff / 8)` bytes, and twice `4 · d_model` for the residual stream meanwhile.

```
DIR/meta.json            what it was made from; another store or text starts anew
DIR/embedding.npy        float16 [n, d_model]: the residual stream before layer 0, times `scale`
DIR/layer-L.input.npy    float16 [n, d_model]: the FFN's input
DIR/layer-L.active.npy   uint8 [n, d_ff / 8]: bit i of a row (lowest first): neuron i is active
```
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage import files
from storage.codecs import LARGEST_HALF
from storage.errors import DiskFull, UnsupportedModel, reason
from storage.store import Store
from workers.lab.offline.dense import DenseModel

BLOCK_TOKENS = 4_096  # that pass through a layer at once
META = "meta.json"
F16 = npt.NDArray[np.float16]
Progress = Callable[[int, int], None]  # layers done, of all


@dataclass(frozen=True, slots=True)
class Samples:
    """What one map learns from: rows of one token each, left on disk until they are asked for."""

    inputs: F16  # [n, d_model], memory-mapped
    active: npt.NDArray[np.uint8]  # [n, ceil(d_ff / 8)], memory-mapped
    d_ff: int
    scale: float  # that the inputs have been multiplied with

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, which: slice | npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs `[k, d_model]` float32 and active `[k, d_ff]` bool."""
        bits = np.unpackbits(self.active[which], axis=1, count=self.d_ff, bitorder="little")
        return torch.from_numpy(self.inputs[which].astype(np.float32)), torch.from_numpy(bits).bool()

    def part(self, start: int, stop: int) -> Samples:
        return Samples(self.inputs[start:stop], self.active[start:stop], self.d_ff, self.scale)


class Activations:
    """The directory, once it is complete."""

    def __init__(self, directory: Path, store: Store) -> None:
        self._directory = directory
        self._units = store.layout.units
        self._scale = float(json.loads((directory / META).read_text(encoding="utf-8"))["scale"])

    def inputs(self, layer: int) -> F16:
        """FFN inputs of `layer`, or the embedding rows for a negative one: `[n, d_model]`."""
        array: F16 = np.load(self._directory / _input_name(layer), mmap_mode="r")
        return array

    def targets(self, layer: int) -> F16:
        """What the FFN of `layer` multiplies with: `[n, d_model]`, which is not what was announced early."""
        own = self._directory / _own_name(layer)
        array: F16 = np.load(own, mmap_mode="r") if own.is_file() else self.inputs(layer)
        return array

    def samples(self, layer: int, lookahead: int) -> Samples:
        """For predicting `layer` from the input of the layer `lookahead` before it."""
        source = layer - lookahead
        active = np.load(self._directory / f"layer-{layer}.active.npy", mmap_mode="r")
        return Samples(self.inputs(source), active, self._units[layer], 1.0 if source >= 0 else self._scale)


def _input_name(layer: int) -> str:
    return f"layer-{layer}.input.npy" if layer >= 0 else "embedding.npy"


def _own_name(layer: int) -> str:
    return f"layer-{layer}.own.npy"


def _differ(store: Store, early: bool) -> bool:
    """Whether what is announced is not what the FFN multiplies with."""
    return early and not all(layer.parallel for layer in store.architecture.layers)


def deciding(
    store: Store, layer: int, units: npt.NDArray[np.uint8] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The projections that decide, gate, up or both: each `[d_ff, d_model]`, with its bias `[d_ff]`; float32.

    `units` saves reading the layer again.
    """
    return [
        (torch.from_numpy(one.rows.widened()), torch.from_numpy(one.bias))
        for one in store.deciding(layer, units)
    ]


def require_relu(store: Store) -> None:
    """Raises UnsupportedModel unless zero activations are exact."""
    architecture = store.architecture
    if architecture.mixture:
        raise UnsupportedModel(
            f"{store.manifest.name} is a mixture of experts, which its own routers choose: no predictors are "
            "trained for it"
        )
    if not architecture.sparse:
        raise UnsupportedModel(
            f"{store.manifest.name} has {architecture.activation} activations: low-rank predictors need a "
            "ReLU model, whose neurons are exactly zero when inactive; run this one with predictor.kind all"
        )


def record(
    store: Store,
    tokens: npt.NDArray[np.int64],
    directory: Path,
    threads: int = 1,
    progress: Progress = lambda done, total: None,
    early: bool = False,
) -> Activations:
    """Run token rows `[rows, length]` through the model; continues after the last complete layer.

    With `early` the inputs are those that are announced before attention (`blocks.before_ffn`).

    Raises UnsupportedModel for models without ReLU, DiskFull before writing more than fits.
    """
    require_relu(store)
    layers = len(store.layout.layers)
    meta = {
        "store": store.identity,
        "tokens": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "early": early,
        "own": _differ(store, early),
    }
    with DenseModel(store, threads) as model, torch.no_grad():
        done = _resume(directory, meta, layers)
        if done < 0:
            _require_space(store, directory, tokens.size, early)
            _begin(model, tokens, directory, meta)
            done = 0
        for layer in range(done, layers):
            progress(layer, layers)
            _pass(store, model, layer, tokens.shape, directory, early)
        progress(layers, layers)
    return Activations(directory, store)


def _resume(directory: Path, meta: dict[str, Any], layers: int) -> int:
    """Layers that are complete; -1 when nothing here can be used, and then nothing is left."""
    try:
        found = json.loads((directory / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if {key: found.get(key) for key in meta} == meta:
        for layer in range(layers, -1, -1):
            if (directory / f"stream-{layer}.npy").exists():
                return layer
    if directory.exists():
        for path in directory.glob("*.np[y]*"):
            path.unlink()
    return -1


def _require_space(store: Store, directory: Path, tokens: int, early: bool) -> None:
    width = store.architecture.d_model
    per_layer = 2 * width * (1 + _differ(store, early))
    bits = sum(-(-units // 8) for units in store.layout.units)
    needed = tokens * (len(store.layout.units) * per_layer + bits + (2 + 2 * 4) * width)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFull(
            f"activations of {tokens:,} tokens need {needed / 1e9:.1f} GB in {directory}, which has "
            f"{free / 1e9:.1f} GB free: give fewer --tokens, or another --work directory"
        )


def _begin(model: DenseModel, tokens: npt.NDArray[np.int64], directory: Path, meta: dict[str, Any]) -> None:
    """The embeddings, scaled to a root mean square of one, and the residual stream before layer 0.

    One scale for all tokens: the file has one number for it, and at run time no token is looked at
    before it is scaled.
    """
    width = model.architecture.d_model
    shape = (tokens.size, width)
    sample = model.embed(tokens[:: max(1, len(tokens) // 8)])
    scale = float(1.0 / sample.double().pow(2).mean().sqrt().clamp_min(1e-6))
    embedding, stream = (
        _Output(directory / "embedding.npy", shape),
        _Output(_stream(directory, 0), shape, "f4"),
    )
    for start, block in _blocks(tokens.shape):
        x = model.embed(tokens[block]).reshape(-1, width)
        embedding.put(start, _half(x * scale))
        stream.put(start, x.numpy())
    embedding.finish()
    files.write_whole(directory / META, json.dumps({**meta, "scale": scale}).encode())
    stream.finish()  # the last one: with it, `_resume` counts this stage as done


def _pass(
    store: Store, model: DenseModel, layer: int, shape: tuple[int, ...], directory: Path, early: bool
) -> None:
    """Everything through one layer."""
    units = store.read_layer(layer)
    deciders = deciding(store, layer, units)
    rows, length = shape
    tokens, width = rows * length, store.architecture.d_model
    before = np.load(_stream(directory, layer), mmap_mode="r")
    inputs = _Output(directory / _input_name(layer), (tokens, width))
    own = _Output(directory / _own_name(layer), (tokens, width)) if _differ(store, early) else None
    active = _Output(
        directory / f"layer-{layer}.active.npy", (tokens, -(-store.layout.units[layer] // 8)), "u1"
    )
    last = layer + 1 == len(store.layout.layers)  # nobody reads the stream behind it: an empty file marks it
    after = _Output(_stream(directory, layer + 1), (0 if last else tokens, width), "f4")
    for start, block in _blocks((rows, length)):
        count = (block.stop - block.start) * length
        x = torch.from_numpy(before[start : start + count].reshape(-1, length, width).copy())

        def keep(layer: int, announced: Tensor, ffn_input: Tensor, start: int = start) -> None:
            inputs.put(start, _half(announced))

        ffn_input, y = model.layer(layer, x, keep, units, early)
        ffn_input = ffn_input.reshape(-1, width)
        if own is not None:
            own.put(start, _half(ffn_input))
        scores = (torch.addmm(bias, ffn_input, matrix.T) for matrix, bias in deciders)
        positive = torch.stack([one > 0 for one in scores]).all(0)
        active.put(start, np.packbits(positive.numpy(), axis=1, bitorder="little"))
        if not last:
            after.put(start, y.reshape(-1, width).numpy())
    inputs.finish()
    if own is not None:
        own.finish()
    active.finish()
    after.finish()
    _stream(directory, layer).unlink()


def _stream(directory: Path, layer: int) -> Path:
    return directory / f"stream-{layer}.npy"


def _half(x: Tensor) -> F16:
    array: F16 = x.clamp(-LARGEST_HALF, LARGEST_HALF).half().numpy()
    return array


def _blocks(shape: tuple[int, ...]) -> list[tuple[int, slice]]:
    """First token and rows of every block."""
    rows, length = shape
    step = max(1, BLOCK_TOKENS // length)
    return [(row * length, slice(row, min(rows, row + step))) for row in range(0, rows, step)]


class _Output:
    """An array file that gets its name when it is complete.

    Written, not mapped: of a mapped file a full disk is told by a signal that nobody can catch.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], kind: str = "f2") -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._dtype = np.dtype(kind)
        self._row = math.prod(shape[1:]) * self._dtype.itemsize  # bytes
        self._file = self._partial.open("wb")
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        with self._filling():
            np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()

    def put(self, start: int, rows: npt.NDArray[Any]) -> None:
        with self._filling():
            self._file.seek(self._start + start * self._row)
            self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def finish(self) -> None:
        with self._filling():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        files.publish(self._partial, self._path)

    @contextlib.contextmanager
    def _filling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskFull(
                f"{self._partial} cannot be written ({reason(error)}); make room and run the same command "
                "again to resume"
            ) from error
