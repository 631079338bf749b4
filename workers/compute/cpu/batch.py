"""Many tokens' operations: matrix products over weights as they are stored, with tokens in panels.

Each result is one sum on one thread (`kernels/panels.py`), so that it does not depend on how many threads
share the rows. Attention's scores are numpy's products, of fixed sizes and on one thread each.
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
        queries = queries * np.float32(a.scale)
        window = a.window or keys.shape[1]
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
            if sinks.size:
                total += np.exp(sinks[head] - highest)
            np.matmul(scores, values[shared, low:known], out=out[start:stop, head])
            out[start:stop, head] /= total

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
        weight, panels = linear.weight, kernels.in_panels(x)
        lines = weight.memory.shape[0]
        out = np.empty((x.shape[0], lines), np.float32)

        def tile(start: int) -> None:
            which = np.arange(start, min(start + TILE, lines))
            found = kernels.new_panels(len(x), which.size, linear.bias[start : start + TILE])
            kernels.multiply(weight, which, panels, found)
            kernels.out_of_panels(found, out[:, start : start + which.size])

        self.pool.run(tile, range(0, lines, TILE))
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
        self._tokens, self._input, self._mask = len(x), kernels.in_panels(x), mask
        self._output = kernels.new_panels(len(x), x.shape[1], bound.down_bias)
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
        _, d_model, _ = self._output.shape
        return kernels.out_of_panels(self._output, np.empty((self._tokens, d_model), np.float32))

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
        active: list[F32] = [np.empty(0, np.float32)] * len(blocks)  # panels of neurons

        def activate(number: int) -> None:
            block = blocks[number]
            ids = neurons_of(np.concatenate(block.ids), self._unit.width)
            a = self._product(block, "up", ids, self._bound.up_bias)
            if self._ffn.kind == "gated":
                a = activated(self._ffn, self._product(block, "gate", ids, self._bound.gate_bias), a)
            else:
                kernels.activations(a.reshape(-1, a.shape[-1]), self._ffn.activation, *self._ffn.numbers)
            if self._mask is not None:
                a *= kernels.in_panels(self._mask[:, ids].astype(np.float32))
            active[number] = a

        def add(start: int) -> None:
            columns = slice(start, min(start + TILE, width))
            for block, a in zip(blocks, active, strict=True):
                self._add(block, a, columns)

        self._pool.run(activate, range(len(blocks)))
        self._pool.run(add, range(0, width, TILE))

    def _product(self, block: _Block, role: Role, neurons: I32, bias: F32) -> F32:
        """Of a role's rows with every token, panels of the block's neurons."""
        out = kernels.new_panels(self._tokens, neurons.size, bias[neurons] if bias.size else None)
        done = 0
        for memory, slots in block.sources:
            rows = self._unit.view(memory, role)
            vectors = neurons_of(slots, rows.count)
            kernels.multiply(rows, vectors, self._input, out, first=done)
            done += vectors.size
        return out

    def _add(self, block: _Block, a: F32, columns: slice) -> None:
        """Add to those columns of the output what a block's neurons, activated by a, do."""
        done = 0
        for memory, slots in block.sources:
            rows = self._unit.view(memory, "down")
            if self._unit.width == 1:
                kernels.combine(rows, slots, columns, a, self._output, value=done)
                done += slots.size
                continue
            for slot in slots.tolist():  # a unit's down rows lie by output
                outputs = slot * rows.count + np.arange(columns.start, columns.stop)
                kernels.multiply(rows, outputs, a, self._output, value=done, first=columns.start)
                done += rows.width
