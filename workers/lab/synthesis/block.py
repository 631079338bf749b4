"""One layer of any `Architecture`, dense, in float32, over all tokens of one sequence.

The reference that synthesis adjusts weights against and that `measure` measures with: it holds one
layer at a time and keeps what happens between attention and FFN. `tensors` maps the parts of
`storage.families.architecture.layer` (`norm.weight`, `qkv.weight`, …), and `up.weight`
`[d_ff, d_model]` and `down.weight` `[d_model, d_ff]`, to float32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from storage.families.architecture import Architecture
from workers.compute import positions

Tensors: TypeAlias = Mapping[str, Tensor]


def normed(model: Architecture, tensors: Tensors, name: str, x: Tensor) -> Tensor:
    """Layer norm `name` over x `[tokens, d_model]`."""
    return functional.layer_norm(
        x, (model.d_model,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], model.norm_epsilon
    )


def attention(model: Architecture, tensors: Tensors, h: Tensor) -> Tensor:
    """Causal self-attention of `[tokens, d_model]`, before the residual is added."""
    heads = attended(model, tensors, h)
    return functional.linear(heads, tensors["out.weight"], tensors.get("out.bias"))


def attended(model: Architecture, tensors: Tensors, h: Tensor) -> Tensor:
    """The heads' outputs `[tokens, heads · head_dim]`, before the output projection."""
    count = h.shape[0]
    fused = functional.linear(h, tensors["qkv.weight"], tensors.get("qkv.bias"))
    sizes = [model.heads * model.head_dim, model.kv_heads * model.head_dim, model.kv_heads * model.head_dim]
    query, key, value = (
        part.reshape(count, -1, model.head_dim).transpose(0, 1) for part in torch.split(fused, sizes, dim=1)
    )  # [heads or kv_heads, tokens, head_dim]
    if model.positions == "rotary":
        query, key = rotated(model, query), rotated(model, key)
    group = model.heads // model.kv_heads
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    biases = None
    if model.positions == "alibi":
        biases = torch.from_numpy(positions.alibi(model.heads, model.head_dim, count))
    outputs = []
    for head in range(model.heads):  # a head at a time: [heads, tokens, tokens] would be large
        scores = query[head] @ key[head // group].T / math.sqrt(model.head_dim)
        if biases is not None:
            scores = scores + biases[head]
        scores = scores.masked_fill(future, -math.inf)
        outputs.append(scores.softmax(dim=-1) @ value[head // group])
    return torch.cat(outputs, dim=1)


def rotated(model: Architecture, x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves paired; x is `[heads, tokens, head_dim]`."""
    tables = positions.rotary(model.rotary_base, model.head_dim, x.shape[1])
    cos, sin = (torch.from_numpy(half).repeat(1, 2) for half in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def activated(model: Architecture, pre: Tensor) -> Tensor:
    """The FFN's activation function."""
    if model.activation == "relu":
        return pre.relu()
    return functional.gelu(pre, approximate="tanh" if model.activation == "gelu_tanh" else "none")


def pre_activation(tensors: Tensors, f: Tensor) -> Tensor:
    """FFN input `[tokens, d_model]` to pre-activations `[tokens, d_ff]`."""
    return functional.linear(f, tensors["up.weight"], tensors.get("up.bias"))


def down(tensors: Tensors, active: Tensor) -> Tensor:
    """Activations `[tokens, d_ff]` to the FFN's output `[tokens, d_model]`."""
    return functional.linear(active, tensors["down.weight"], tensors.get("down.bias"))


def ffn_input(model: Architecture, tensors: Tensors, x: Tensor, attended_x: Tensor) -> Tensor:
    """What the FFN reads, given the block's input x and its attention's output."""
    if model.block == "parallel":
        return normed(model, tensors, "norm" if model.shared_norm else "ffn_norm", x)
    if model.block == "post_norm":
        return normed(model, tensors, "norm", x + attended_x)
    return normed(model, tensors, "ffn_norm", x + attended_x)


def attention_input(model: Architecture, tensors: Tensors, x: Tensor) -> Tensor:
    """What attention reads: x itself in a post-norm block."""
    return x if model.block == "post_norm" else normed(model, tensors, "norm", x)


def block_output(
    model: Architecture, tensors: Tensors, x: Tensor, attended_x: Tensor, f: Tensor, ffn: Tensor
) -> Tensor:
    """The residual stream after the block; f is the FFN's input."""
    if model.block == "post_norm":
        return normed(model, tensors, "ffn_norm", f + ffn)
    return x + attended_x + ffn


def embedded(model: Architecture, tensors: Tensors, tokens: Tensor) -> Tensor:
    """Token ids `[tokens]` to the first block's input; `tensors` by their full canonical names."""
    x = tensors["embed.weight"][tokens].float()
    if model.embed_dim != model.d_model:
        x = x @ tensors["project_in.weight"].T
    if model.positions == "learned":
        start = model.position_offset
        x = x + tensors["positions.weight"][start : start + tokens.shape[0]].float()
    return x
