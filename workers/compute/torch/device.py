"""A torch device as a `Device`: the same model in plain float32 products.

Weights stay in their codec and are widened when they are used. Without a context nothing is kept from step
to step, and a step may be of several sequences, each from position 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from storage.architecture import EMBED, POSITIONS, Attention, Ffn, NormPlace
from storage.codecs import F32, FLOAT32, FLOATS, Codec
from storage.layout import Role, Rows, Unit, neurons_of
from workers.compute.bound import BoundLayer, BoundModel, BoundNorm, BoundShared, Linear
from workers.compute.device import I32, Bytes, Mask
from workers.compute.logits import finished
from workers.compute.positions import Positions
from workers.compute.weights import Weights
from workers.routing import Ids, Routing, route, weigh


class TorchDevice:
    """`device.Device` over tensors; hidden states are [sequences · tokens, d_model] float32."""

    rows = 1  # the bits of a product's row may hang on how many there are

    def __init__(
        self,
        weights: Weights,
        context: int = 0,
        cache_codec: Codec = FLOAT32,
        where: str | torch.device = "cpu",
    ) -> None:
        """`context` in tokens, 0 to keep nothing; keys and values are kept in `cache_codec`, a float."""
        self.architecture = weights.architecture
        self._weights = weights
        self._model = BoundModel.of(weights)
        self._units = [layer.unit for layer in weights.layout.layers]
        self._where = torch.device(where)
        self._positions = self._tables(context)
        self._first = 0
        self._sequences = 1
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._routing: Routing | None = None  # of the layer at hand
        if context:
            kind = getattr(torch, cache_codec.name)
            for layer in self.architecture.layers:
                shape = (layer.attention.kv_heads, context, layer.attention.head_dim)
                keys, values = (torch.zeros(shape, dtype=kind, device=self._where) for _ in range(2))
                self._kept.append((keys, values))

    def begin(self, first: int, count: int, every: bool, sequences: int = 1) -> None:
        assert not self._kept or sequences == 1, "the cache holds one sequence"
        assert self._kept or first == 0, "nothing is kept of what was before"
        self._first, self._sequences = first, sequences
        if not self._kept and count != self._positions.context:
            self._positions = self._tables(count)

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> Tensor:
        x = self._here(self._weights.lines(EMBED, tokens))
        if self.architecture.embedding_scale != 1:
            x *= self.architecture.embedding_scale
        if self._model.project_in is not None:
            x = self._linear(self._model.project_in, x)
        if self.architecture.learned_positions is not None:
            row = self.architecture.learned_positions + self._first
            rows = self._weights.lines(POSITIONS, slice(row, row + tokens.size // self._sequences))
            x = x + self._here(rows).repeat(self._sequences, 1)
        return x

    def norm(self, index: int, place: NormPlace, x: Tensor) -> Tensor:
        return self._normed(self._model.layers[index].norms[place], x)

    def attention(self, index: int, x: Tensor) -> Tensor:
        a, bound = self.architecture.layers[index].attention, self._model.layers[index]
        widths = [heads * a.head_dim for heads in (a.heads, a.kv_heads, a.kv_heads)]
        queries, keys, values = torch.split(self._linear(bound.qkv, x), widths, dim=1)
        if a.qk_norm is not None:
            queries = self._normed_heads(a, bound.q_norm, queries)
            keys = self._normed_heads(a, bound.k_norm, keys)
        queries, keys, values = (  # [sequences, heads, tokens, head_dim]
            part.reshape(self._sequences, -1, part.shape[1] // a.head_dim, a.head_dim).transpose(1, 2)
            for part in (queries, keys, values)
        )
        tokens = queries.shape[2]
        if a.rope is not None:
            rows = slice(self._first, self._first + tokens)
            cos, sin = (self._here(table[rows]) for table in self._positions.rotary[index])
            queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
        if self._kept:
            keys, values = self._with_past(index, keys[0], values[0])
        mask = self._mask(index, tokens)
        if a.softcap is not None or a.sinks:
            keys, values = (part.repeat_interleave(a.heads // a.kv_heads, dim=1) for part in (keys, values))
            scores = queries @ keys.transpose(2, 3) * a.scale
            if a.softcap is not None:
                scores = a.softcap * torch.tanh(scores / a.softcap)
            mixed = self._shares(bound, scores + mask) @ values
        else:
            mixed = functional.scaled_dot_product_attention(
                queries, keys, values, mask, scale=a.scale, enable_gqa=a.heads != a.kv_heads
            )
        return self._linear(bound.out, mixed.transpose(1, 2).reshape(x.shape[0], a.width))

    def route(self, index: int, x: Tensor) -> Ids:
        router, bound = self.architecture.layers[index].ffn.router, self._model.layers[index].router
        assert router is not None
        assert bound is not None
        self._routing = route(router, self.host(self._linear(bound, x)))
        return self._routing.ids

    def settle(self, index: int, ids: Ids) -> None:
        router = self.architecture.layers[index].ffn.router
        assert router is not None
        assert self._routing is not None
        self._routing = weigh(router, self._routing.logits, ids)

    def ffn(self, index: int, x: Tensor, mask: Mask | None = None) -> TorchFfn | TorchExperts:
        ffn, bound, unit = self.architecture.layers[index].ffn, self._model.layers[index], self._units[index]
        if ffn.mixed:
            assert mask is None, "experts are chosen, not masked"
            routing, self._routing = self._routing, None
            shared = None if bound.shared is None else self._of_shared(ffn, bound.shared, x)
            return TorchExperts(bound, unit, ffn, x, routing, shared)
        return TorchFfn(bound, unit, ffn, x, mask)

    def _of_shared(self, ffn: Ffn, shared: BoundShared, x: Tensor) -> Tensor:
        a = gated(ffn, self._linear(shared.gate, x), self._linear(shared.up, x))
        output = self._linear(shared.down, a)
        return output if shared.switch is None else output * self._linear(shared.switch, x).sigmoid()

    def logits(self, x: Tensor) -> F32:
        if self._model.final_norm is not None:
            x = self._normed(self._model.final_norm, x)
        if self._model.project_out is not None:
            x = self._linear(self._model.project_out, x)
        return finished(self.architecture, self.host(self._linear(self._model.head, x)))

    def host(self, x: Tensor) -> F32:
        found: F32 = x.cpu().numpy()
        return found

    def close(self) -> None:
        """Nothing is held but memory."""

    def _tables(self, context: int) -> Positions:
        return Positions([layer.attention for layer in self.architecture.layers], context)

    def _normed_heads(self, a: Attention, norm: BoundNorm | None, x: Tensor) -> Tensor:
        """Of x [tokens, heads · head_dim], each head by itself or all together."""
        assert a.qk_norm is not None
        assert norm is not None
        width = a.head_dim if a.qk_norm.over == "head" else x.shape[1]
        return self._normed(norm, x.reshape(-1, width)).view(x.shape)

    def _with_past(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the step's; returns all so far, [1, kv_heads, tokens, head_dim] float32, these unrounded."""
        last = self._first + keys.shape[1]
        whole = []
        for kept, new in zip(self._kept[index], (keys, values), strict=True):
            whole.append(torch.cat((kept[:, : self._first].float(), new), dim=1)[None])
            kept[:, self._first : last] = new.to(kept.dtype)
        return whole[0], whole[1]

    def _mask(self, index: int, tokens: int) -> Tensor:
        """[heads or 1, tokens, past + tokens]: ALiBi where there is one, no future, and a window's past."""
        known = self._first + tokens
        bias = self._positions.bias[index]
        mask = self._here(bias[:, None, :known]) if bias.size else torch.zeros(1, 1, 1, device=self._where)
        allowed = torch.ones(tokens, known, dtype=torch.bool, device=self._where).tril(self._first)
        window = self.architecture.layers[index].attention.window
        if window is not None:
            allowed = allowed.triu(self._first - window + 1)
        return mask.masked_fill(~allowed, -torch.inf)

    def _shares(self, bound: BoundLayer, scores: Tensor) -> Tensor:
        """Of keys, [1, heads, tokens, keys]; a sink takes its own of them all."""
        if not bound.sinks.size:
            return scores.softmax(-1)
        sinks = self._here(bound.sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]

    def _linear(self, linear: Linear, x: Tensor) -> Tensor:
        bias = self._here(linear.bias) if linear.bias.size else None
        return functional.linear(x, _widened(linear.weight, self._where), bias)

    def _normed(self, norm: BoundNorm, x: Tensor) -> Tensor:
        weight, bias = self._here(norm.weight), self._here(norm.bias)
        if norm.norm.kind == "rms":
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.norm.epsilon)
            return x * scale * (weight + norm.norm.offset)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.norm.epsilon)

    def _here(self, array: F32) -> Tensor:
        return torch.from_numpy(array).to(self._where)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first values of each head, as many as there are angles for, twice."""
    pairs = cos.shape[-1]
    low, high, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def _widened(rows: Rows, where: torch.device) -> Tensor:
    """[lines, width] float32."""
    if rows.codec.name not in FLOATS:
        return torch.from_numpy(rows.widened()).to(where)
    values = torch.from_numpy(rows.values).view(getattr(torch, rows.codec.name))
    return values.to(where).float()


class TorchFfn:
    """One layer's FFN, computed at its end in one product over all units, by ascending id."""

    def __init__(self, bound: BoundLayer, unit: Unit, ffn: Ffn, x: Tensor, mask: Mask | None) -> None:
        """x [rows, d_model]; mask [rows, neurons], where given, silences neurons."""
        self._bound, self._unit, self._ffn = bound, unit, ffn
        self._input, self._mask = x, mask
        self._ids: list[I32] = []
        self._copies: list[Bytes] = []  # [n, stride]: slots are given to others meanwhile
        self.active = 0

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        self._ids.append(ids.copy())
        self._copies.append(memory[slots])

    def close(self) -> None:
        """Every unit has been copied."""

    def finish(self) -> Tensor:
        x, where = self._input, self._input.device
        output = torch.zeros_like(x)
        if self._bound.down_bias.size:
            output += torch.from_numpy(self._bound.down_bias).to(where)
        if not self._ids:
            return output
        ids, units = np.concatenate(self._ids), np.concatenate(self._copies)
        order = np.argsort(ids, kind="stable")
        ids, units = ids[order], units[order]
        ids = neurons_of(ids, self._unit.width)
        a = self._product("up", units, ids, self._bound.up_bias)
        if self._ffn.kind == "gated":
            a = gated(self._ffn, self._product("gate", units, ids, self._bound.gate_bias), a)
        else:
            a = activated(self._ffn, a)
        if self._mask is not None:
            a *= torch.from_numpy(self._mask[:, ids]).to(where)
        self.active = int(torch.count_nonzero(a))
        down = _widened(self._unit.view(units, "down"), where)
        if self._unit.width > 1:  # by output: [units · d_model, width]
            down = down.view(len(units), -1, self._unit.width).transpose(1, 2).flatten(0, 1)
        return torch.addmm(output, a, down)

    def _product(self, role: Role, units: Bytes, ids: I32, bias: F32) -> Tensor:
        """Of every row with a role's, [rows, n]."""
        where = self._input.device
        product = functional.linear(self._input, _widened(self._unit.view(units, role), where))
        if bias.size:
            product += torch.from_numpy(bias[ids]).to(where)
        return product


class TorchExperts:
    """One layer's FFN of experts, each computed with the rows that chose it; summed by ascending id."""

    def __init__(
        self,
        bound: BoundLayer,
        unit: Unit,
        ffn: Ffn,
        x: Tensor,
        routing: Routing | None,
        shared: Tensor | None,
    ) -> None:
        """x [rows, d_model]; `routing` is None without experts, `shared` the shared part's output."""
        self._bound, self._unit, self._ffn, self._input = bound, unit, ffn, x
        self._routing, self._shared = routing, shared
        self._outputs: dict[int, tuple[Tensor, Tensor]] = {}  # of each expert: rows, and what they get
        self.active = 0

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        for expert, slot in zip(ids.tolist(), slots.tolist(), strict=True):
            assert self._routing is not None
            rows, places = np.nonzero(self._routing.ids == expert)
            if rows.size:
                weights = torch.from_numpy(self._routing.weights[rows, places]).to(self._input.device)
                which = torch.from_numpy(rows).to(self._input.device)
                found = self._of_expert(memory[slot : slot + 1], expert, self._input[which])
                self._outputs[expert] = which, weights[:, None] * found
                self.active += 1

    def close(self) -> None:
        """Every expert has been computed."""

    def finish(self) -> Tensor:
        output = torch.zeros_like(self._input)
        for expert in sorted(self._outputs):
            rows, found = self._outputs[expert]
            output[rows] += found
        return output if self._shared is None else output + self._shared

    def _of_expert(self, unit: Bytes, expert: int, x: Tensor) -> Tensor:
        def product(role: Role, x: Tensor, bias: F32) -> Tensor:
            product = functional.linear(x, _widened(self._unit.view(unit, role), x.device).view(shape[role]))
            if bias.size:
                product += torch.from_numpy(bias.reshape(self._ffn.units, -1)[expert]).to(x.device)
            return product

        shape = {row.role: self._unit.shape(row.role) for row in self._unit.rows}
        gate = product("gate", x, self._bound.gate_bias)
        a = gated(self._ffn, gate, product("up", x, self._bound.up_bias))
        return product("down", a, self._bound.down_bias)


def gated(ffn: Ffn, gate: Tensor, up: Tensor) -> Tensor:
    """A gated FFN's activations from its products."""
    match ffn.up_activation:
        case "relu":
            up = functional.relu(up)
        case "clamped":
            up = up.clamp(-ffn.limit, ffn.limit) + 1
    return activated(ffn, gate) * up


def activated(ffn: Ffn, x: Tensor) -> Tensor:
    """The FFN's activation function of x."""
    match ffn.activation:
        case "relu":
            return functional.relu(x)
        case "fatrelu":
            return functional.threshold(x, ffn.threshold, 0.0)
        case "silu":
            return functional.silu(x)
        case "clamped_silu":
            x = x.clamp(max=ffn.limit)
            return x * torch.sigmoid(ffn.alpha * x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
