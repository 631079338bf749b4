"""Many tokens' operations: float32 matrix products over weights as they are stored, by numpy's BLAS.

Weights are widened tile by tile. Tiles have fixed sizes and every product runs on one thread, so
that the result does not depend on how many threads share them.

Weights stand on the left of a product, tokens on the right: that is a fifth faster than the reverse.
Torch's products are 6 % faster still, but importing it takes 160 MiB, which are worth more as slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ring.plan import BLOCK, BLOCKS, QUERIES, TILE
from storage.architecture import EMBED, POSITIONS, Ffn, NormPlace
from storage.codecs import F32
from storage.layout import Role, Unit, neurons_of
from workers import kernels
from workers.compute import blocks
from workers.compute.bound import BoundLayer, BoundModel, Linear, Source
from workers.compute.cpu.experts import BatchExperts, activated, of_shared, resettled, routed
from workers.compute.cpu.norms import norm_queries_and_keys, normed
from workers.compute.cpu.pool import Pool
from workers.compute.device import I32, Bytes, Mask
from workers.compute.kv_cache import KeyValueCache
from workers.compute.logits import capped, finished
from workers.compute.positions import Positions
from workers.routing import Ids, Routing


class BatchOperations:
    """The part of `device.Device` that is many tokens'; x is [tokens, d_model]."""

    def __init__(
        self, source: Source, model: BoundModel, positions: Positions, cache: KeyValueCache, pool: Pool
    ) -> None:
        self.architecture = source.architecture
        self.source = source
        self.model = model
        self.cache = cache
        self.pool = pool
        self.first = 0  # position of the first token
        self._positions = positions
        self._units = [layer.unit for layer in source.layout.layers]
        self._routing: Routing | None = None  # of the layer at hand

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> F32:
        x = self.source.lines(EMBED, tokens)
        if self.architecture.embedding_scale != 1:
            x *= np.float32(self.architecture.embedding_scale)
        if self.model.project_in is not None:
            x = self._linear(self.model.project_in, x)
        if self.architecture.learned_positions is not None:
            row = self.architecture.learned_positions + self.first
            x = x + self.source.lines(POSITIONS, slice(row, row + tokens.size))
        return x

    def norm(self, index: int, place: NormPlace, x: F32) -> F32:
        return normed(self.model.layers[index].norms[place], x)

    def attention(self, index: int, x: F32) -> F32:
        a, bound = self.architecture.layers[index].attention, self.model.layers[index]
        fused = self._linear(bound.qkv, x)
        norm_queries_and_keys(a, bound, fused)
        fused = fused.reshape(x.shape[0], -1, a.head_dim).swapaxes(0, 1)  # [heads, tokens, head_dim]
        queries, keys, values = np.split(fused, (a.heads, a.heads + a.kv_heads))
        if a.rope is not None:
            rows = slice(self.first, self.first + x.shape[0])
            cos, sin = (table[rows] for table in self._positions.rotary[index])
            queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
        before = self.cache.past(index, self.first) if self.first else None
        self.cache.put(index, self.first, keys, values)
        if before is not None:
            keys, values = (np.concatenate(pair, axis=1) for pair in zip(before, (keys, values), strict=True))
        return self._linear(bound.out, self._mixed(index, queries, keys, values))

    def onward(self, index: int, x: F32) -> tuple[F32, F32]:
        return blocks.onward(self.architecture.layers[index], self, index, x)

    def _mixed(self, index: int, queries: F32, keys: F32, values: F32) -> F32:
        """Causal attention, [tokens, heads · head_dim]; some tokens of a head at a time."""
        a, bias = self.architecture.layers[index].attention, self._positions.bias[index]
        tokens, sinks = queries.shape[1], self.model.layers[index].sinks
        before = keys.shape[1] - tokens
        group = a.heads // a.kv_heads
        scale, window = np.float32(a.scale), a.window or keys.shape[1]
        out = np.empty((tokens, a.heads, a.head_dim), np.float32)
        future = np.triu(np.ones((QUERIES, QUERIES), np.bool_), 1)

        def attend(head: int, start: int) -> None:
            stop = min(start + QUERIES, tokens)
            known = before + stop
            oldest = before + start + 1 - window  # key that the first of these tokens sees
            low = max(0, oldest)
            shared = head // group
            scores = self.pool.scratch(stop - start, known - low)
            np.matmul(queries[head, start:stop], keys[shared, low:known].T, out=scores)
            scores *= scale
            if a.softcap is not None:
                capped(scores, a.softcap)
            if bias.size:
                scores += bias[head, low:known]
            if known - window > low:
                scores[np.tri(stop - start, known - low, oldest - low - 1, dtype=np.bool_)] = -np.inf
            scores[:, before + start - low :][future[: stop - start, : stop - start]] = -np.inf
            highest = scores.max(axis=1, keepdims=True)
            if sinks.size:
                highest = np.maximum(highest, sinks[head])
            scores -= highest
            np.exp(scores, out=scores)
            total = scores.sum(axis=1, keepdims=True)
            scores /= total + np.exp(sinks[head] - highest) if sinks.size else total
            np.matmul(scores, values[shared, low:known], out=out[start:stop, head])

        tasks = product(range(a.heads), range(0, tokens, QUERIES))
        self.pool.run(attend, *zip(*tasks, strict=True))
        return out.reshape(tokens, -1)

    def route(self, index: int, x: F32) -> Ids:
        router = self.model.layers[index].router
        assert router is not None
        logits = kernels.matvecs(router.weight, x, self.pool.threads, router.bias)
        self._routing = routed(self.architecture.layers[index].ffn, logits)
        return self._routing.ids

    def settle(self, index: int, ids: Ids) -> None:
        self._routing = resettled(self.architecture.layers[index].ffn, self._routing, ids)

    def ffn(self, index: int, x: F32, mask: Mask | None = None) -> BatchFfn | BatchExperts:
        layer = self.architecture.layers[index]
        if layer.ffn.mixed:
            assert mask is None, "experts are chosen, not masked"
            routing, self._routing = self._routing, None
            bound, unit = self.model.layers[index], self._units[index]
            shared = None if bound.shared is None else of_shared(layer.ffn, bound.shared, x, self._linear)
            return BatchExperts(bound, unit, layer.ffn, x, routing, shared, self.pool)
        return BatchFfn(self.model.layers[index], self._units[index], layer.ffn, x, self.pool, mask)

    def logits(self, x: F32) -> F32:
        if self.model.final_norm is not None:
            x = normed(self.model.final_norm, x)
        if self.model.project_out is not None:
            x = self._linear(self.model.project_out, x)
        return finished(self.architecture, self._linear(self.model.head, x))

    def _linear(self, linear: Linear, x: F32) -> F32:
        weight = linear.weight
        lines = weight.memory.shape[0]
        out = np.empty((x.shape[0], lines), np.float32)

        def tile(start: int) -> None:
            which = np.arange(start, min(start + TILE, lines))
            wide = self.pool.scratch(which.size, weight.width)
            kernels.gather(weight, which, 0, weight.width, wide)
            out[:, start : start + which.size] = (wide @ x.T).T

        self.pool.run(tile, range(0, lines, TILE))
        if linear.bias.size:
            out += linear.bias
        return out


def _rotated(x: F32, cos: F32, sin: F32) -> F32:
    """The first values of each head, as many as there are angles for, twice."""
    pairs = cos.shape[-1]
    low, high, rest = np.split(x, (pairs, 2 * pairs), axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)


@dataclass(slots=True)
class _Block:
    """Units of one block: sources are (memory, slots)."""

    ids: list[I32] = field(default_factory=list)
    sources: list[tuple[Bytes, I32]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(ids.size for ids in self.ids)


class BatchFfn:
    """One layer's FFN of many tokens, summed block by block in ascending neuron id.

    Blocks are cut at multiples of BLOCK neurons, whatever comes in which part: a block that a group leaves
    unfinished is copied out of its slots and waits for the rest.
    """

    def __init__(
        self, bound: BoundLayer, unit: Unit, ffn: Ffn, x: F32, pool: Pool, mask: Mask | None = None
    ) -> None:
        """x [n, d_model]; mask [n, neurons], where given, silences neurons."""
        self._bound, self._unit, self._ffn, self._pool = bound, unit, ffn, pool
        self._input, self._mask = x, mask
        self._output = np.zeros(x.shape[::-1], np.float32)  # [d_model, n]
        if bound.down_bias.size:
            self._output += bound.down_bias[:, None]
        self._parts: list[tuple[I32, I32]] = []  # ids and slots of the group's parts
        self._memory: Bytes | None = None
        self._waiting = _Block()
        self._per_block = max(1, BLOCK // unit.width)  # units
        self.active = 0  # not counted: many tokens want every unit

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        self._parts.append((ids, slots))
        self._memory = memory

    def close(self) -> None:
        """A group's parts come in any order of ids, and groups ascend."""
        if self._memory is None:
            return
        ids, slots = (np.concatenate(several) for several in zip(*self._parts, strict=True))
        order = np.argsort(ids, kind="stable")
        self._take_up(ids[order], slots[order], self._memory)
        self._parts.clear()
        self._memory = None

    def finish(self) -> F32:
        if self._waiting.ids:
            self._sum([self._take()])
        return self._output.T

    def _take_up(self, ids: I32, slots: I32, memory: Bytes) -> None:
        blocks: list[_Block] = []
        per = self._per_block
        cuts = np.flatnonzero(np.diff(ids // per)) + 1
        for some, where in zip(np.split(ids, cuts), np.split(slots, cuts), strict=True):
            if not some.size:
                continue
            if self._waiting.ids and self._waiting.ids[0][0] // per != some[0] // per:
                blocks.append(self._take())
            self._waiting.ids.append(some)
            self._waiting.sources.append((memory, where))
            if some[-1] % per == per - 1 or some[-1] == self._ffn.units - 1:
                blocks.append(self._take())
        for start in range(0, len(blocks), BLOCKS):
            self._sum(blocks[start : start + BLOCKS])
        self._keep(memory)

    def _take(self) -> _Block:
        block, self._waiting = self._waiting, _Block()
        return block

    def _keep(self, memory: Bytes) -> None:
        """Copy what waits out of its slots."""
        self._waiting.sources = [
            (source[slots], np.arange(slots.size, dtype=np.int32)) if source is memory else (source, slots)
            for source, slots in self._waiting.sources
        ]

    def _sum(self, blocks: Sequence[_Block]) -> None:
        width = self._input.shape[1]
        active: list[F32] = [np.empty(0, np.float32)] * len(blocks)  # [neurons, n]

        def activate(number: int) -> None:
            block = blocks[number]
            ids = neurons_of(np.concatenate(block.ids), self._unit.width)
            a = self._product(block, "up", ids, self._bound.up_bias)
            if self._ffn.kind == "gated":
                a = activated(self._ffn, self._product(block, "gate", ids, self._bound.gate_bias), a)
            else:
                kernels.activations(a, self._ffn.activation, *self._ffn.numbers)
            if self._mask is not None:
                a *= self._mask[:, ids].T
            active[number] = a

        def add(start: int) -> None:
            columns = min(TILE, width - start)
            total = self._output[start : start + columns]
            for block, a in zip(blocks, active, strict=True):
                self._add(block, a, start, total)

        self._pool.run(activate, range(len(blocks)))
        self._pool.run(add, range(0, width, TILE))

    def _product(self, block: _Block, role: Role, neurons: I32, bias: F32) -> F32:
        """Of a role's rows with every token, [neurons, n]."""
        width = self._unit.width
        wide = self._rows(block, role, slice(0, width), slice(0, self._input.shape[1]))
        product: F32 = wide @ self._input.T
        if bias.size:
            product += bias[neurons, None]
        return product

    def _add(self, block: _Block, a: F32, start: int, total: F32) -> None:
        """total [columns, n] += what a block's neurons, activated by a [neurons, n], add from `start` on."""
        width, columns = self._unit.width, slice(start, start + total.shape[0])
        if width == 1:
            total += self._rows(block, "down", slice(0, 1), columns).T @ a
            return
        rows = self._rows(block, "down", columns, slice(0, width)).reshape(-1, total.shape[0], width)
        for number, outputs in enumerate(rows):  # a unit's down rows lie by output
            total += outputs @ a[number * width : (number + 1) * width]

    def _rows(self, block: _Block, role: Role, which: slice, columns: slice) -> F32:
        """Some rows of each unit of a block, some of their values, widened in scratch: [rows, columns]."""
        each, size = which.stop - which.start, columns.stop - columns.start
        out = self._pool.scratch(block.count * each, size)
        done, within = 0, np.arange(which.start, which.stop)
        for memory, slots in block.sources:
            rows = self._unit.view(memory, role)
            vectors = (slots.astype(np.int64)[:, None] * rows.count + within).reshape(-1)
            kernels.gather(rows, vectors, columns.start, size, out[done : done + vectors.size])
            done += vectors.size
        return out
