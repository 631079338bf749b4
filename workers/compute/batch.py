"""Many tokens' operations: float32 matrix products over weights in their own dtype, by numpy's BLAS.

Weights are widened tile by tile. Tiles have fixed sizes and every product runs on one thread, so
that the result does not depend on how many threads share them.

Weights stand on the left of a product, tokens on the right: that is a fifth faster than the reverse.
Torch's products are 6 % faster still, but importing it takes 160 MiB, which are worth more as slots.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from storage.families.architecture import (
    EMBED,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    PROJECT_IN,
    PROJECT_OUT,
    layer,
)
from storage.floats import widen
from workers import kernels
from workers.compute import positions
from workers.compute.weights import Weights

TILE = 512  # rows of a weight widened at once
BLOCK = 256  # neurons of one product, at multiples of BLOCK
QUERIES = 128  # tokens of one head whose attention is computed at once
_GROUP = 8  # blocks whose activations are kept at once

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


class Workers:
    """A pool of threads, each of which multiplies on itself alone; so do all others of the process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        threadpool_limits(1, "blas")  # for good: results must not change when another pool is closed
        self._pool = ThreadPoolExecutor(threads, "compute")
        self._own = threading.local()

    def run(self, task: Callable[..., None], *arguments: Iterable[Any]) -> None:
        """`task` for all arguments, at once."""
        for _ in self._pool.map(task, *arguments):
            pass

    def scratch(self, rows: int, width: int) -> F32:
        """[rows, width] of the calling thread's memory, which its next call gives away again."""
        memory: F32 | None = getattr(self._own, "memory", None)
        if memory is None or memory.size < rows * width:
            memory = self._own.memory = np.empty(rows * width, np.float32)
        return memory[: rows * width].reshape(rows, width)

    def close(self) -> None:
        self._pool.shutdown()


class BatchOperations:
    """`blocks.Operations` for whole sequences: x is [sequences, tokens, d_model] float32.

    `kept` is called with (layer, keys, values), [sequences, kv_heads, tokens, head_dim] each. The first
    token has position `past`; `earlier` gives (keys, values) of a layer for the positions before.
    """

    def __init__(
        self,
        weights: Weights,
        workers: Workers,
        kept: Callable[[int, F32, F32], None] | None = None,
        earlier: Callable[[int], tuple[F32, F32]] | None = None,
    ) -> None:
        self.architecture = weights.architecture
        self.weights = weights
        self.workers = workers
        self._kept = kept
        self._earlier = earlier
        self.past = 0

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> F32:
        """The residual stream before layer 0, of token ids [sequences, tokens]."""
        x = widen(self.weights.matrix(EMBED)[tokens], self.weights.dtype)
        if self.weights.has(PROJECT_IN):
            x = self._linear("project_in", x)
        if self.architecture.positions == "learned":
            first = self.architecture.position_offset + self.past
            rows = self.weights.matrix(POSITIONS)[first : first + tokens.shape[1]]
            x = x + widen(rows, self.weights.dtype)
        return x

    def norm(self, name: str, x: F32) -> F32:
        weight, bias = self.weights.vector(f"{name}.weight"), self.weights.vector(f"{name}.bias")
        return kernels.layer_norm(x, weight, bias, self.architecture.norm_epsilon)

    def attention(self, index: int, x: F32) -> F32:
        a = self.architecture
        fused = self._linear(layer(index, "qkv"), x)
        # [sequences, heads, tokens, head_dim]
        fused = fused.reshape(*x.shape[:2], -1, a.head_dim).swapaxes(1, 2)
        queries, keys, values = np.split(fused, (a.heads, a.heads + a.kv_heads), axis=1)
        if a.positions == "rotary":
            tables = positions.rotary(a.rotary_base, a.head_dim, self.past + x.shape[1])
            cos, sin = (table[self.past :] for table in tables)
            queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
        if self._kept is not None:
            self._kept(index, keys, values)
        if self.past and self._earlier is not None:
            before_keys, before_values = self._earlier(index)
            keys = np.concatenate((before_keys, keys), axis=2)
            values = np.concatenate((before_values, values), axis=2)
        return self._linear(layer(index, "out"), self._mixed(queries, keys, values))

    def _mixed(self, queries: F32, keys: F32, values: F32) -> F32:
        """Causal attention, [sequences, tokens, heads · head_dim]; some tokens of a head at a time."""
        a = self.architecture
        sequences, _, tokens, width = queries.shape
        before = keys.shape[2] - tokens
        group = a.heads // a.kv_heads
        scale = np.float32(1 / np.sqrt(width))
        bias = positions.alibi(a.heads, width, keys.shape[2]) if a.positions == "alibi" else None
        out = np.empty((sequences, tokens, a.heads, width), np.float32)
        future = np.triu(np.ones((QUERIES, QUERIES), np.bool_), 1)

        def attend(sequence: int, head: int, start: int) -> None:
            stop = min(start + QUERIES, tokens)
            known = before + stop
            shared = head // group
            scores = self.workers.scratch(stop - start, known)
            np.matmul(queries[sequence, head, start:stop], keys[sequence, shared, :known].T, out=scores)
            scores *= scale
            if bias is not None:
                scores += bias[head, :known]
            scores[:, before + start :][future[: stop - start, : stop - start]] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            np.matmul(scores, values[sequence, shared, :known], out=out[sequence, start:stop, head])

        tasks = product(range(sequences), range(a.heads), range(0, tokens, QUERIES))
        self.workers.run(attend, *zip(*tasks, strict=True))
        return out.reshape(sequences, tokens, -1)

    def logits(self, x: F32) -> F32:
        """[sequences, tokens, vocabulary]."""
        if self.architecture.final_norm:
            x = self.norm(FINAL_NORM, x)
        if self.weights.has(PROJECT_OUT):
            x = self._linear("project_out", x)
        return self._product(EMBED if self.architecture.tied_head else HEAD, x)

    def _linear(self, name: str, x: F32) -> F32:
        y = self._product(f"{name}.weight", x)
        bias = self.weights.vector(f"{name}.bias")
        if bias.size:
            y += bias
        return y

    def _product(self, name: str, x: F32) -> F32:
        weight, dtype = self.weights.matrix(name), self.weights.dtype
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty((rows.shape[0], weight.shape[0]), np.float32)

        def tile(start: int) -> None:
            which = np.arange(start, min(start + TILE, weight.shape[0]), dtype=np.int32)
            wide = self.workers.scratch(which.size, weight.shape[1])
            kernels.gather(weight, which, 0, weight.shape[1], dtype, wide)
            out[:, start : start + which.size] = (wide @ rows.T).T

        self.workers.run(tile, range(0, weight.shape[0], TILE))
        return out.reshape(*x.shape[:-1], -1)


def _rotated(x: F32, cos: F32, sin: F32) -> F32:
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


@dataclass(slots=True)
class _Block:
    """Neurons of one block: sources are (bundles, slots)."""

    ids: list[I32] = field(default_factory=list)
    sources: list[tuple[npt.NDArray[Any], I32]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(ids.size for ids in self.ids)


class BatchFfn:
    """One layer's FFN of many tokens, summed block by block in ascending neuron id.

    Blocks are cut at multiples of BLOCK, whatever comes in which part: a block that a part leaves
    unfinished is copied out of its slots and waits for the rest.
    """

    def __init__(
        self,
        operations: BatchOperations,
        index: int,
        ffn_input: F32,
        mask: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """ffn_input [n, d_model]; mask [n, d_ff], where given, silences neurons."""
        self._input = ffn_input
        self._mask = mask
        self._weights = operations.weights
        self._workers = operations.workers
        self._function = operations.architecture.activation
        self._d_ff = operations.architecture.d_ff
        self._up_bias = operations.weights.vector(layer(index, "up.bias"))
        self._output = np.zeros(ffn_input.shape[::-1], np.float32)  # [d_model, n]
        down_bias = operations.weights.vector(layer(index, "down.bias"))
        if down_bias.size:
            self._output += down_bias[:, None]
        self._waiting = _Block()

    def add(self, ids: I32, slots: I32, bundles: npt.NDArray[Any]) -> None:
        """Add neurons `ids`, ascending and above all before; the slots are free again on return."""
        blocks: list[_Block] = []
        cuts = np.flatnonzero(np.diff(ids // BLOCK)) + 1
        for some, where in zip(np.split(ids, cuts), np.split(slots, cuts), strict=True):
            if not some.size:
                continue
            if self._waiting.ids and self._waiting.ids[0][0] // BLOCK != some[0] // BLOCK:
                blocks.append(self._take())
            self._waiting.ids.append(some)
            self._waiting.sources.append((bundles, where))
            if some[-1] % BLOCK == BLOCK - 1 or some[-1] == self._d_ff - 1:
                blocks.append(self._take())
        for start in range(0, len(blocks), _GROUP):
            self._sum(blocks[start : start + _GROUP])
        self._keep(bundles)

    def finish(self) -> F32:
        """The FFN's output [n, d_model]."""
        if self._waiting.ids:
            self._sum([self._take()])
        return self._output.T

    def _take(self) -> _Block:
        block, self._waiting = self._waiting, _Block()
        return block

    def _keep(self, bundles: npt.NDArray[Any]) -> None:
        """Copy what waits out of its slots."""
        self._waiting.sources = [
            (source[slots], np.arange(slots.size, dtype=np.int32)) if source is bundles else (source, slots)
            for source, slots in self._waiting.sources
        ]

    def _sum(self, blocks: Sequence[_Block]) -> None:
        width = self._input.shape[1]
        active: list[F32] = [np.empty(0, np.float32)] * len(blocks)  # [neurons, n]

        def activate(number: int) -> None:
            block = blocks[number]
            ids = np.concatenate(block.ids)
            a = self._rows(block, 0, width) @ self._input.T
            if self._up_bias.size:
                a += self._up_bias[ids, None]
            kernels.activations(a, self._function)
            if self._mask is not None:
                a *= self._mask[:, ids].T
            active[number] = a

        def add(start: int) -> None:
            columns = min(TILE, width - start)
            total = self._output[start : start + columns]
            for block, a in zip(blocks, active, strict=True):
                total += self._rows(block, width + start, columns).T @ a

        self._workers.run(activate, range(len(blocks)))
        self._workers.run(add, range(0, width, TILE))

    def _rows(self, block: _Block, start: int, width: int) -> F32:
        """Elements [start, start + width) of a block's bundles, widened, in scratch: [neurons, width]."""
        out = self._workers.scratch(block.count, width)
        done = 0
        for bundles, slots in block.sources:
            kernels.gather(bundles, slots, start, width, self._weights.dtype, out[done : done + slots.size])
            done += slots.size
        return out
