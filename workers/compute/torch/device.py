"""A torch device as a `Device`: the CPU through torch, CUDA, or Metal. Products are float32.

Resident weights, keys and values lie in its memory (`weights.py`, `attention.py`), and so does a mirror of
slots (`shelf.py`). Without a context nothing is kept from step to step, and a step may be of several
sequences, each from position 0: that is the dense reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.ring.counters import of_layer
from storage.architecture import Attention, Ffn, NormPlace
from storage.codecs import F32, FLOAT32, Codec
from workers import kernels
from workers.compute import blocks
from workers.compute.bound import Linear, Source
from workers.compute.device import Mask
from workers.compute.logits import finished
from workers.compute.torch.attention import Attending
from workers.compute.torch.ffn import TorchExperts, TorchFfn, gated
from workers.compute.torch.shelf import Shelf
from workers.compute.torch.weights import Placed, PlacedNorm, PlacedShared
from workers.routing import Ids, Routing, route, weigh


class TorchDevice:
    """`device.Device` over tensors; hidden states are [sequences · tokens, d_model] float32."""

    rows = 1  # the bits of a product's row may hang on how many there are

    def __init__(
        self,
        source: Source,
        context: int = 0,
        cache_codec: Codec = FLOAT32,
        where: str | torch.device = "cpu",
        mirrored: int = 0,
        direct: bool = False,
    ) -> None:
        """`context` in tokens, 0 to keep nothing; keys and values are kept in `cache_codec`, a float.

        The first `mirrored` slots, those of the first layers, stay on the device too. `direct`: units go over
        straight from the slots (`shelf.py`).
        """
        self.architecture = source.architecture
        self._where = torch.device(where)
        self.placed = self.place(source, self._where)
        self._units = [layer.unit for layer in source.layout.layers]
        self._attending = Attending(source.architecture, context, cache_codec, self._where)
        self._shelf = Shelf(self._where, source.layout.stride, mirrored, direct)
        self._first = 0
        self._sequences = 1
        self._routing: Routing | None = None  # of the layer at hand
        self._ffns: list[tuple[int, TorchFfn]] = []  # of the step, each with its layer

    def place(self, source: Source, where: torch.device) -> Placed:
        """The model's weights, there."""
        return Placed(source, where)

    @property
    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, [kv_heads, context, head_dim] of each layer."""
        return self._attending.kept

    def begin(self, first: int, count: int, every: bool, sequences: int = 1) -> None:
        self._attending.begin(first, count, sequences)
        self._first, self._sequences, self._shelf.every = first, sequences, every
        self._ffns.clear()

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> Tensor:
        which = torch.from_numpy(tokens.astype(np.int64)).to(self._where)
        x = self.placed.embed.lines(which)
        if self.architecture.embedding_scale != 1:
            x = x * self.architecture.embedding_scale
        if self.placed.project_in is not None:
            x = self.placed.project_in(x)
        if self.architecture.learned_positions is not None:
            assert self.placed.positions is not None
            row = self.architecture.learned_positions + self._first
            rows = self.placed.positions.lines(slice(row, row + tokens.size // self._sequences))
            x = x + rows.repeat(self._sequences, 1)
        return x

    def norm(self, index: int, place: NormPlace, x: Tensor) -> Tensor:
        return self.placed.layers[index].norms[place](x)

    def attention(self, index: int, x: Tensor) -> Tensor:
        a, placed = self.architecture.layers[index].attention, self.placed.layers[index]
        widths = [heads * a.head_dim for heads in (a.heads, a.kv_heads, a.kv_heads)]
        queries, keys, values = torch.split(placed.qkv(x), widths, dim=1)
        if a.qk_norm is not None:
            queries = _normed_heads(a, placed.q_norm, queries)
            keys = _normed_heads(a, placed.k_norm, keys)
        return placed.out(self._attending(index, queries, keys, values, placed.sinks))

    def onward(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.onward(self.architecture.layers[index], self, index, x)

    def route(self, index: int, x: Tensor) -> Ids:
        """One row after the other, by the kernel that the predictor chooses with: the bits are the same."""
        router, linear = self.architecture.layers[index].ffn.router, self.placed.layers[index].router
        assert router is not None
        assert linear is not None
        self._routing = route(router, self.router_logits(linear, x))
        return self._routing.ids

    def router_logits(self, linear: Linear, x: Tensor) -> F32:
        """[rows, experts]."""
        return np.stack([kernels.matvec(linear.weight, row, 1, linear.bias) for row in self.host(x)])

    def settle(self, index: int, ids: Ids) -> None:
        router = self.architecture.layers[index].ffn.router
        assert router is not None
        assert self._routing is not None
        self._routing = weigh(router, self._routing.logits, ids)

    def ffn(self, index: int, x: Tensor, mask: Mask | None = None) -> TorchFfn | TorchExperts:
        ffn, placed, unit = (
            self.architecture.layers[index].ffn,
            self.placed.layers[index],
            self._units[index],
        )
        if ffn.mixed:
            assert mask is None, "experts are chosen, not masked"
            routing, self._routing = self._routing, None
            shared = None if placed.shared is None else _of_shared(ffn, placed.shared, x)
            return TorchExperts(placed, unit, ffn, x, routing, shared, self._shelf)
        made = TorchFfn(placed, unit, ffn, x, mask, self._shelf)
        if not self._shelf.every:
            self._ffns.append((index, made))
        return made

    def logits(self, x: Tensor) -> F32:
        if self.placed.final_norm is not None:
            x = self.placed.final_norm(x)
        if self.placed.project_out is not None:
            x = self.placed.project_out(x)
        found = finished(self.architecture, self.host(self.placed.head(x)))
        self._count()
        return found

    def _count(self) -> None:
        """Add up the step's active neurons, now that the host has waited for all of it."""
        counted = [(index, ffn.nonzero) for index, ffn in self._ffns if ffn.nonzero is not None]
        self._ffns.clear()
        if counted:
            numbers = torch.stack([count for _, count in counted]).tolist()
            for (index, _), number in zip(counted, numbers, strict=True):
                self._shelf.counts[of_layer(index, "active")] += number
                self._shelf.counts["active"] += number

    def host(self, x: Tensor) -> F32:
        found: F32 = x.cpu().numpy()
        return found

    def counters(self) -> dict[str, float]:
        found = dict(list(self._shelf.counts.items()))
        if self._where.type == "cuda":
            found["device_bytes"] = float(torch.cuda.max_memory_reserved(self._where))
        return found

    def close(self) -> None:
        """Nothing is held but memory."""


def _normed_heads(a: Attention, norm: PlacedNorm | None, x: Tensor) -> Tensor:
    """Of x [tokens, heads · head_dim], each head by itself or all together."""
    assert a.qk_norm is not None
    assert norm is not None
    width = a.head_dim if a.qk_norm.over == "head" else x.shape[1]
    return norm(x.reshape(-1, width)).view(x.shape)


def _of_shared(ffn: Ffn, shared: PlacedShared, x: Tensor) -> Tensor:
    output = shared.down(gated(ffn, shared.gate(x), shared.up(x)))
    return output if shared.switch is None else output * shared.switch(x).sigmoid()
