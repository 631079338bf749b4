"""A dense float64 reference: logits of a whole prompt straight from a store's files.

Written from `Architecture`'s docstring and the papers, independent of the compute worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from storage.architecture import Attention, Layer, Norm, Rope
from storage.manifest import RESIDENT
from storage.store import Store

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def logits(store: Store, ids: list[int]) -> Tensor:
    """`[len(ids), vocabulary]` float64."""
    model = store.architecture
    weights = {name: value.double() for name, value in load_file(store.path / RESIDENT).items()}
    x = weights["embed.weight"][ids]
    if "project_in.weight" in weights:
        x = x @ weights["project_in.weight"].T
    if model.learned_positions is not None:
        x = x + weights["positions.weight"][model.learned_positions :][: len(ids)]
    for index, layer in enumerate(model.layers):
        part = {
            name.removeprefix(f"layers.{index}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        x = _block(layer, part, *_ffn_matrices(store, index), x)
    if model.final_norm is not None:
        x = _norm(model.final_norm, weights, "final_norm", x)
    if "project_out.weight" in weights:
        x = x @ weights["project_out.weight"].T
    return x @ weights["embed.weight" if model.tied_head else "head.weight"].T


def _ffn_matrices(store: Store, layer: int) -> tuple[Tensor, Tensor]:
    """Up `[neurons, d_model]` and the down-projection's columns as rows, `[neurons, d_model]`."""
    dtype = getattr(torch, store.layout.layers[layer].unit.rows[0].codec)
    width = store.architecture.d_model
    values = torch.from_numpy(store.read_layer(layer).copy()).view(dtype).double()
    return values[:, :width], values[:, width : 2 * width]


def _block(layer: Layer, part: dict[str, Tensor], up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    def ffn(h: Tensor) -> Tensor:
        active = ACTIVATIONS[layer.ffn.activation](h @ up.T + part.get("up.bias", 0))
        return active @ down + part.get("down.bias", 0)

    def norm(name: str, h: Tensor) -> Tensor:
        return _norm(next(iter(layer.norms.values())), part, name, h)

    attention = layer.attention
    if layer.parallel:
        second = "ffn_norm" if "ffn_input" in layer.norms else "norm"
        return x + _attention(attention, part, norm("norm", x)) + ffn(norm(second, x))
    if "ffn_input" in layer.norms:
        x = x + _attention(attention, part, norm("norm", x))
        return x + ffn(norm("ffn_norm", x))
    x = norm("norm", x + _attention(attention, part, x))
    return norm("ffn_norm", x + ffn(x))


def _norm(norm: Norm, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(
        x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], norm.epsilon
    )


def _attention(model: Attention, part: dict[str, Tensor], x: Tensor) -> Tensor:
    sizes = [model.heads * model.head_dim] + 2 * [model.kv_heads * model.head_dim]
    fused = x @ part["qkv.weight"].T + part.get("qkv.bias", 0)
    q, k, v = (t.view(len(x), -1, model.head_dim).transpose(0, 1) for t in fused.split(sizes, dim=-1))
    k, v = (t.repeat_interleave(model.heads // model.kv_heads, dim=0) for t in (k, v))
    if model.rope is not None:
        q, k = _rotate(model.rope, q), _rotate(model.rope, k)
    scores = q @ k.transpose(1, 2)
    if model.alibi:
        scores = scores + _alibi(model.heads, len(x))
    scores = scores / math.sqrt(model.head_dim)
    mask = torch.triu(torch.full((len(x), len(x)), -math.inf, dtype=torch.double), diagonal=1)
    mixed = (scores + mask).softmax(-1) @ v
    out = mixed.transpose(0, 1).reshape(len(x), -1)
    return out @ part["out.weight"].T + part.get("out.bias", 0)


def _rotate(rope: Rope, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = rope.base ** (-torch.arange(half, dtype=torch.double) / half)
    angles = torch.arange(x.shape[1], dtype=torch.double)[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _alibi(heads: int, length: int) -> Tensor:
    """Slopes of Press et al.; Falcon rounds slope and product to bfloat16, and scales with the scores."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    products = torch.tensor(slopes)[:, None].bfloat16() * torch.arange(length)
    return products[:, None, :].double()
