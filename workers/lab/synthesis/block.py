"""One `Layer` of any architecture, dense, in float32, over all tokens of one sequence.

The reference that synthesis adjusts weights against and that `measure` measures with: it holds one
layer at a time and keeps what happens between attention and FFN. `tensors` maps the parts of
`storage.architecture.layer` (`norm.weight`, `qkv.weight`, …), and `gate.weight` (gated only) and
`up.weight` `[neurons, d_model]` and `down.weight` `[d_model, neurons]`, to float32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from storage.architecture import NORM_PARTS, Architecture, Attention, Ffn, Layer, Norm, NormPlace, Rope
from storage.layout import Role
from workers.compute import positions

Tensors: TypeAlias = Mapping[str, Tensor]
Products: TypeAlias = Mapping[Role, Tensor]  # of an FFN's input with its gate and up rows: [tokens, neurons]


def normed(layer: Layer, tensors: Tensors, place: NormPlace, x: Tensor) -> Tensor:
    """The layer's norm at `place` over x `[tokens, d_model]`; x itself where there is none."""
    if place not in layer.norms:
        return x
    name = NORM_PARTS[place]
    return _norm(layer.norms[place], x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _norm(norm: Norm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Over the last dimension."""
    if norm.kind == "rms":
        return functional.rms_norm(x, x.shape[-1:], weight + norm.offset, norm.epsilon)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.epsilon)


def attention(layer: Layer, tensors: Tensors, h: Tensor) -> Tensor:
    """Causal self-attention of `[tokens, d_model]`, before the residual is added."""
    heads = attended(layer, tensors, h)
    return functional.linear(heads, tensors["out.weight"], tensors.get("out.bias"))


def attended(layer: Layer, tensors: Tensors, h: Tensor) -> Tensor:
    """The heads' outputs `[tokens, heads · head_dim]`, before the output projection."""
    a, count = layer.attention, h.shape[0]
    fused = functional.linear(h, tensors["qkv.weight"], tensors.get("qkv.bias"))
    sizes = [a.width, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
    flat_query, flat_key, flat_value = torch.split(fused, sizes, dim=1)
    query, key, value = (
        part.reshape(count, -1, a.head_dim).transpose(0, 1)
        for part in (
            _query_or_key_norm(a, tensors, "q", flat_query),
            _query_or_key_norm(a, tensors, "k", flat_key),
            flat_value,
        )
    )  # [heads or kv_heads, tokens, head_dim]
    if a.rope is not None:
        query, key = rotated(a.rope, query), rotated(a.rope, key)
    group = a.heads // a.kv_heads
    hidden = _hidden(a, count)
    biases = None
    if a.alibi:
        biases = torch.from_numpy(positions.alibi(a.heads, a.head_dim, count))
    outputs = []
    for head in range(a.heads):  # a head at a time: [heads, tokens, tokens] would be large
        scores = query[head] @ key[head // group].T * a.scale
        if a.softcap is not None:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        if biases is not None:
            scores = scores + biases[head]
        scores = scores.masked_fill(hidden, -math.inf)
        if a.sinks:
            scores = torch.cat((scores, tensors["sinks"][head].expand(count, 1)), dim=1)
        outputs.append(scores.softmax(dim=-1)[:, :count] @ value[head // group])
    return torch.cat(outputs, dim=1)


def _query_or_key_norm(a: Attention, tensors: Tensors, one: str, x: Tensor) -> Tensor:
    """x is `[tokens, heads · head_dim]`."""
    if a.qk_norm is None:
        return x
    over = a.head_dim if a.qk_norm.over == "head" else x.shape[1]
    apart = x.reshape(x.shape[0], -1, over)
    return _norm(a.qk_norm.norm, apart, tensors[f"{one}_norm.weight"], None).reshape(x.shape)


def _hidden(a: Attention, count: int) -> Tensor:
    """Which keys a query does not see, `[tokens, tokens]`: later ones, and those before its window."""
    everything = torch.ones(count, count, dtype=torch.bool)
    future = everything.triu(1)
    return future if a.window is None else future | everything.tril(-a.window)


def rotated(rope: Rope, x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves paired; x is `[heads, tokens, head_dim]`."""
    tables = positions.rotary(rope, x.shape[2], x.shape[1])
    cos, sin = (torch.from_numpy(half) for half in tables)
    first, second, rest = torch.split(x, [cos.shape[1], cos.shape[1], x.shape[2] - 2 * cos.shape[1]], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def products(layer: Layer, tensors: Tensors, f: Tensor) -> dict[Role, Tensor]:
    """Of the FFN input `[tokens, d_model]` with the rows that make activations, by their role."""
    roles: tuple[Role, ...] = ("up",) if layer.ffn.kind == "plain" else ("gate", "up")
    return {
        role: functional.linear(f, tensors[f"{role}.weight"], tensors.get(f"{role}.bias")) for role in roles
    }


def activated(ffn: Ffn, made: Products) -> Tensor:
    """Activations `[tokens, neurons]`: what the down-projection's columns are weighed with."""
    if ffn.kind == "plain":
        return _function(ffn, made["up"])
    up = made["up"]
    if ffn.up_activation == "relu":
        up = up.relu()
    elif ffn.up_activation == "clamped":
        up = 1 + up.clamp(-ffn.limit, ffn.limit)
    return _function(ffn, made["gate"]) * up


def _function(ffn: Ffn, x: Tensor) -> Tensor:
    if ffn.sparse:
        return functional.threshold(x, ffn.threshold, 0.0)
    if ffn.activation == "silu":
        return functional.silu(x)
    if ffn.activation == "clamped_silu":
        limited = x.clamp(max=ffn.limit)
        return limited * torch.sigmoid(ffn.alpha * limited)
    return functional.gelu(x, approximate="tanh" if ffn.activation == "gelu_tanh" else "none")


def excess(ffn: Ffn, made: Products) -> Tensor:
    """By how much each neuron exceeds what makes it active, `[tokens, neurons]`.

    Of a function without zeros: the product that it is applied to.
    """
    first, *others = ffn.deciding
    least = made[first] - ffn.threshold
    for role in others:
        least = torch.minimum(least, made[role])
    return least


def down(tensors: Tensors, active: Tensor) -> Tensor:
    """Activations `[tokens, neurons]` to the FFN's output `[tokens, d_model]`."""
    return functional.linear(active, tensors["down.weight"], tensors.get("down.bias"))


def attention_input(layer: Layer, tensors: Tensors, x: Tensor) -> Tensor:
    """What attention reads."""
    return normed(layer, tensors, "attention_input", x)


def ffn_input(layer: Layer, tensors: Tensors, x: Tensor, attended_x: Tensor) -> Tensor:
    """What the FFN reads, given the block's input x and its attention's output."""
    if layer.parallel:
        place: NormPlace = "ffn_input" if "ffn_input" in layer.norms else "attention_input"
        return normed(layer, tensors, place, x)
    return normed(layer, tensors, "ffn_input", _after_attention(layer, tensors, x, attended_x))


def _after_attention(layer: Layer, tensors: Tensors, x: Tensor, attended_x: Tensor) -> Tensor:
    branch = layer.branch_scale * normed(layer, tensors, "attention_output", attended_x)
    return normed(layer, tensors, "attention_sum", x + branch)


def block_output(layer: Layer, tensors: Tensors, x: Tensor, attended_x: Tensor, ffn: Tensor) -> Tensor:
    """The residual stream after the block."""
    stream = _after_attention(layer, tensors, x, attended_x)
    branch = layer.branch_scale * normed(layer, tensors, "ffn_output", ffn)
    return normed(layer, tensors, "ffn_sum", stream + branch)


def embedded(model: Architecture, tensors: Tensors, tokens: Tensor) -> Tensor:
    """Token ids `[tokens]` to the first block's input; `tensors` by their full canonical names."""
    x = tensors["embed.weight"][tokens].float() * model.embedding_scale
    if model.embed_dim != model.d_model:
        x = x @ tensors["project_in.weight"].T
    start = model.learned_positions
    if start is not None:
        x = x + tensors["positions.weight"][start : start + tokens.shape[0]].float()
    return x
