"""Many tokens' operations: torch matrix products in float32 over weights in their own dtype.

Weights are widened tile by tile. Tiles have fixed sizes and every product runs on one thread, so
that the result does not depend on how many threads share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from storage.families.architecture import (
    EMBED,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    PROJECT_IN,
    PROJECT_OUT,
    layer,
)
from workers import kernels
from workers.compute import positions
from workers.compute.weights import Weights

TILE = 512  # rows of a weight widened at once
BLOCK = 256  # neurons of one product, at multiples of BLOCK
_GROUP = 8  # blocks whose activations are kept at once

I32 = npt.NDArray[np.int32]


class Workers:
    """A pool of threads, each of which runs torch on itself alone."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "compute", initializer=torch.set_num_threads, initargs=(1,))

    def run(self, task: Callable[..., None], *arguments: Iterable[Any]) -> None:
        """`task` for all arguments, at once."""
        for _ in self._pool.map(task, *arguments):
            pass

    def close(self) -> None:
        self._pool.shutdown()


class BatchOperations:
    """`blocks.Operations` for whole sequences: x is [sequences, tokens, d_model].

    `kept` is called with (layer, keys, values), [sequences, kv_heads, tokens, head_dim] each. The first
    token has position `past`; `earlier` gives (keys, values) of a layer for the positions before.
    """

    def __init__(
        self,
        weights: Weights,
        workers: Workers,
        kept: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        earlier: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.architecture = weights.architecture
        self.weights = weights
        self.workers = workers
        self._kept = kept
        self._earlier = earlier
        self.past = 0

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The residual stream before layer 0, of token ids [sequences, tokens]."""
        x = self.weights.tensor(EMBED)[tokens].float()
        if self.weights.has(PROJECT_IN):
            x = self._linear("project_in", x)
        if self.architecture.positions == "learned":
            offset = self.architecture.position_offset + self.past
            x = x + self.weights.tensor(POSITIONS)[offset : offset + tokens.shape[1]].float()
        return x

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._vector(f"{name}.weight"), self._vector(f"{name}.bias")
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, self.architecture.norm_epsilon)

    def attention(self, index: int, x: torch.Tensor) -> torch.Tensor:
        a = self.architecture
        fused = self._linear(layer(index, "qkv"), x)
        fused = fused.reshape(*x.shape[:2], -1, a.head_dim).transpose(
            1, 2
        )  # [sequences, heads, tokens, head_dim]
        queries, keys = fused[:, : a.heads], fused[:, a.heads : a.heads + a.kv_heads]
        values = fused[:, a.heads + a.kv_heads :]
        if a.positions == "rotary":
            tables = positions.rotary(a.rotary_base, a.head_dim, self.past + x.shape[1])
            cos, sin = (torch.from_numpy(table)[self.past :] for table in tables)
            queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
        if self._kept is not None:
            self._kept(index, keys, values)
        if self.past and self._earlier is not None:
            before_keys, before_values = self._earlier(index)
            keys = torch.cat((before_keys, keys), dim=2)
            values = torch.cat((before_values, values), dim=2)
        return self._linear(layer(index, "out"), self._mixed(queries, keys, values))

    def _mixed(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Causal attention, [sequences, tokens, heads · head_dim]; a key-value head at a time."""
        a = self.architecture
        tokens, known = queries.shape[2], keys.shape[2]
        group = a.heads // a.kv_heads
        out = torch.empty_like(queries)
        bias = None
        future = torch.ones(tokens, known, dtype=torch.bool).triu(known - tokens + 1)
        if a.positions == "alibi":
            bias = torch.from_numpy(positions.alibi(a.heads, a.head_dim, known))

        def attend(head: int) -> None:
            mine = slice(head * group, (head + 1) * group)
            shared = slice(head, head + 1)
            mask = None if known == tokens else ~future
            if bias is not None:
                mask = bias[mine, None].masked_fill(future, -torch.inf)
            out[:, mine] = functional.scaled_dot_product_attention(
                queries[:, mine],
                keys[:, shared].expand(-1, group, -1, -1),
                values[:, shared].expand(-1, group, -1, -1),
                attn_mask=mask,
                is_causal=mask is None,
            )

        self.workers.run(attend, range(a.kv_heads))
        return out.transpose(1, 2).flatten(2)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, vocabulary]."""
        if self.architecture.final_norm:
            x = self.norm(FINAL_NORM, x)
        if self.weights.has(PROJECT_OUT):
            x = self._linear("project_out", x)
        return self._product(self.weights.tensor(EMBED if self.architecture.tied_head else HEAD), x)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self._product(self.weights.tensor(f"{name}.weight"), x)
        bias = self._vector(f"{name}.bias")
        return y if bias is None else y.add_(bias)

    def _product(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(rows.shape[0], weight.shape[0])

        def tile(start: int) -> None:
            part = weight[start : start + TILE].float()
            out[:, start : start + TILE] = rows @ part.T

        self.workers.run(tile, range(0, weight.shape[0], TILE))
        return out.reshape(*x.shape[:-1], -1)

    def _vector(self, name: str) -> torch.Tensor | None:
        vector = self.weights.vector(name)
        return torch.from_numpy(vector) if vector.size else None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


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
        ffn_input: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> None:
        """ffn_input [n, d_model]; mask [n, d_ff] bool, where given, silences neurons."""
        self._input = ffn_input
        self._mask = mask
        self._weights = operations.weights
        self._workers = operations.workers
        self._function = operations.architecture.activation
        self._d_ff = operations.architecture.d_ff
        self._up_bias = operations.weights.vector(layer(index, "up.bias"))
        self.output = torch.zeros_like(ffn_input)
        down_bias = operations.weights.vector(layer(index, "down.bias"))
        if down_bias.size:
            self.output += torch.from_numpy(down_bias)
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

    def finish(self) -> torch.Tensor:
        """The FFN's output [n, d_model]."""
        if self._waiting.ids:
            self._sum([self._take()])
        return self.output

    def _take(self) -> _Block:
        block, self._waiting = self._waiting, _Block()
        return block

    def _keep(self, bundles: npt.NDArray[Any]) -> None:
        """Copy what waits out of its slots."""
        self._waiting.sources = [
            (source[slots], np.arange(slots.size, dtype=np.int32)) if source is bundles else (source, slots)
            for source, slots in self._waiting.sources
        ]

    def _sum(self, blocks: list[_Block]) -> None:
        width = self._input.shape[1]
        active: list[torch.Tensor] = [torch.empty(0)] * len(blocks)

        def activate(number: int) -> None:
            block = blocks[number]
            ids = np.concatenate(block.ids)
            up = self._rows(block, 0, width)
            pre = self._input @ up.T
            if self._up_bias.size:
                pre += torch.from_numpy(self._up_bias[ids])
            a = _activated(pre, self._function)
            if self._mask is not None:
                a *= self._mask[:, torch.from_numpy(ids).long()]
            active[number] = a

        def add(start: int) -> None:
            columns = min(TILE, width - start)
            total = self.output[:, start : start + columns]
            for block, a in zip(blocks, active, strict=True):
                total += a @ self._rows(block, width + start, columns)

        self._workers.run(activate, range(len(blocks)))
        self._workers.run(add, range(0, width, TILE))

    def _rows(self, block: _Block, start: int, width: int) -> torch.Tensor:
        """Elements [start, start + width) of a block's bundles, widened: [neurons, width]."""
        out = np.empty((block.count, width), np.float32)
        done = 0
        for bundles, slots in block.sources:
            kernels.gather(bundles, slots, start, width, self._weights.dtype, out[done : done + slots.size])
            done += slots.size
        return torch.from_numpy(out)


def _activated(x: torch.Tensor, function: str) -> torch.Tensor:
    if function == "relu":
        return torch.relu_(x)
    return functional.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")
