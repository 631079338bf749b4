"""One `Layer` of any architecture, dense, in float32, over all tokens of one sequence.

The reference that synthesis adjusts weights against and that `measure` measures with: it holds one
layer at a time and keeps what happens between attention and FFN. `tensors` maps the parts of
`storage.architecture.layer` (`norm.weight`, `qkv.weight`, …), and `up.weight`
`[neurons, d_model]` and `down.weight` `[d_model, neurons]`, to float32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from storage.architecture import NORM_PARTS, Architecture, Layer, NormPlace, Rope
from workers.compute import positions

Tensors: TypeAlias = Mapping[str, Tensor]


def normed(layer: Layer, tensors: Tensors, place: NormPlace, x: Tensor) -> Tensor:
    """The layer's norm at `place` over x `[tokens, d_model]`; x itself where there is none."""
    if place not in layer.norms:
        return x
    weight, bias = (tensors[f"{NORM_PARTS[place]}.{part}"] for part in ("weight", "bias"))
    return functional.layer_norm(x, x.shape[-1:], weight, bias, layer.norms[place].epsilon)


def attention(layer: Layer, tensors: Tensors, h: Tensor) -> Tensor:
    """Causal self-attention of `[tokens, d_model]`, before the residual is added."""
    heads = attended(layer, tensors, h)
    return functional.linear(heads, tensors["out.weight"], tensors.get("out.bias"))


def attended(layer: Layer, tensors: Tensors, h: Tensor) -> Tensor:
    """The heads' outputs `[tokens, heads · head_dim]`, before the output projection."""
    a, count = layer.attention, h.shape[0]
    fused = functional.linear(h, tensors["qkv.weight"], tensors.get("qkv.bias"))
    sizes = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
    query, key, value = (
        part.reshape(count, -1, a.head_dim).transpose(0, 1) for part in torch.split(fused, sizes, dim=1)
    )  # [heads or kv_heads, tokens, head_dim]
    if a.rope is not None:
        query, key = rotated(a.rope, query), rotated(a.rope, key)
    group = a.heads // a.kv_heads
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    biases = None
    if a.alibi:
        biases = torch.from_numpy(positions.alibi(a.heads, a.head_dim, count))
    outputs = []
    for head in range(a.heads):  # a head at a time: [heads, tokens, tokens] would be large
        scores = query[head] @ key[head // group].T / math.sqrt(a.head_dim)
        if biases is not None:
            scores = scores + biases[head]
        scores = scores.masked_fill(future, -math.inf)
        outputs.append(scores.softmax(dim=-1) @ value[head // group])
    return torch.cat(outputs, dim=1)


def rotated(rope: Rope, x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves paired; x is `[heads, tokens, head_dim]`."""
    tables = positions.rotary(rope, x.shape[2], x.shape[1])
    cos, sin = (torch.from_numpy(half).repeat(1, 2) for half in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def activated(layer: Layer, pre: Tensor) -> Tensor:
    """The FFN's activation function."""
    activation = layer.ffn.activation
    if activation == "relu":
        return pre.relu()
    return functional.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def pre_activation(tensors: Tensors, f: Tensor) -> Tensor:
    """FFN input `[tokens, d_model]` to pre-activations `[tokens, neurons]`."""
    return functional.linear(f, tensors["up.weight"], tensors.get("up.bias"))


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
    return normed(layer, tensors, "ffn_input", normed(layer, tensors, "attention_sum", x + attended_x))


def block_output(layer: Layer, tensors: Tensors, x: Tensor, attended_x: Tensor, ffn: Tensor) -> Tensor:
    """The residual stream after the block."""
    stream = normed(layer, tensors, "attention_sum", x + attended_x)
    return normed(layer, tensors, "ffn_sum", stream + ffn)


def embedded(model: Architecture, tensors: Tensors, tokens: Tensor) -> Tensor:
    """Token ids `[tokens]` to the first block's input; `tensors` by their full canonical names."""
    x = tensors["embed.weight"][tokens].float()
    if model.embed_dim != model.d_model:
        x = x @ tensors["project_in.weight"].T
    start = model.learned_positions
    if start is not None:
        x = x + tensors["positions.weight"][start : start + tokens.shape[0]].float()
    return x
