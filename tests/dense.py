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

from storage.architecture import (
    Attention,
    Ffn,
    Layer,
    Llama3Scaling,
    LongropeScaling,
    Norm,
    NormPlace,
    Rope,
    YarnScaling,
)
from storage.manifest import RESIDENT
from storage.store import Store

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def logits(store: Store, ids: list[int]) -> Tensor:
    """`[len(ids), vocabulary]` float64."""
    model = store.architecture
    weights = {name: value.double() for name, value in load_file(store.path / RESIDENT).items()}
    x = weights["embed.weight"][ids] * model.embedding_scale
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
        x = _block(layer, part, _ffn_matrices(store, index), x)
    if model.final_norm is not None:
        x = _norm(model.final_norm, weights, "final_norm", x)
    if "project_out.weight" in weights:
        x = x @ weights["project_out.weight"].T
    out = x @ weights["embed.weight" if model.tied_head else "head.weight"].T * model.logit_scale
    cap = model.logit_softcap
    return out if cap is None else cap * (out / cap).tanh()


def _ffn_matrices(store: Store, layer: int) -> list[Tensor]:
    """Gate, where there is one, up, and the down-projection's columns as rows: `[neurons, d_model]` each.

    Of experts gate, up `[experts, width, d_model]` and down `[experts, d_model, width]`.
    """
    ffn, rows = store.architecture.layers[layer].ffn, store.layout.layers[layer].unit.rows
    dtype, width = getattr(torch, rows[0].codec), store.architecture.d_model
    if not ffn.units:
        return [torch.zeros(0, width, dtype=torch.double)] * 2
    values = torch.from_numpy(store.read_layer(layer).copy()).view(dtype).double()
    if ffn.router is not None:
        gate, up, down, _ = values.split(
            [*3 * [ffn.width * width], values.shape[1] - 3 * ffn.width * width], 1
        )
        shape = (ffn.units, ffn.width, width)
        return [gate.reshape(shape), up.reshape(shape), down.reshape(ffn.units, width, ffn.width)]
    return [values[:, width * i : width * (i + 1)] for i in range(len(rows))]


def _block(layer: Layer, part: dict[str, Tensor], matrices: list[Tensor], x: Tensor) -> Tensor:
    up, down = matrices[-2:]
    router, start = layer.ffn.router, x

    def ffn(h: Tensor) -> Tensor:
        if layer.ffn.router is not None or layer.ffn.shared is not None:
            return _experts(
                layer.ffn, part, matrices, start if router and router.reads == "layer_input" else h, h
            )
        raised = h @ up.T + part.get("up.bias", 0)
        activation = ACTIVATIONS[layer.ffn.activation]
        if layer.ffn.kind == "gated":
            active = raised * activation(h @ matrices[0].T + part.get("gate.bias", 0))
        else:
            active = activation(raised)
        return active @ down + part.get("down.bias", 0)

    def norm(place: NormPlace, name: str, h: Tensor) -> Tensor:
        return _norm(layer.norms[place], part, name, h) if place in layer.norms else h

    attended = _attention(layer.attention, part, norm("attention_input", "norm", x))
    if layer.parallel:
        own = norm("ffn_input", "ffn_norm", x)
        return x + attended + ffn(own if "ffn_input" in layer.norms else norm("attention_input", "norm", x))
    attended = norm("attention_output", "out_norm", attended)
    x = norm("attention_sum", "norm", x + layer.branch_scale * attended)
    branch = norm("ffn_output", "down_norm", ffn(norm("ffn_input", "ffn_norm", x)))
    return norm("ffn_sum", "ffn_norm", x + layer.branch_scale * branch)


def _experts(ffn: Ffn, part: dict[str, Tensor], matrices: list[Tensor], routed: Tensor, h: Tensor) -> Tensor:
    """Token by token and expert by expert, as the papers have it."""

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        if ffn.activation == "clamped_silu":
            gate = gate.clamp(max=ffn.limit)
            return gate * (ffn.alpha * gate).sigmoid() * (1 + up.clamp(-ffn.limit, ffn.limit))
        return ACTIVATIONS[ffn.activation](gate) * up

    def bias(role: str, expert: int) -> Tensor | int:
        return part[f"{role}.bias"].view(ffn.units, -1)[expert] if f"{role}.bias" in part else 0

    output = torch.zeros_like(h)
    for row in range(len(h) if ffn.router else 0):
        assert ffn.router is not None
        scores = part["router.weight"] @ routed[row] + part.get("router.bias", 0)
        best = scores.topk(ffn.router.top_k).indices
        weights = scores[best].sigmoid() if ffn.router.scores == "sigmoid" else scores.softmax(0)[best]
        if ffn.router.scores == "softmax" and ffn.router.over == "chosen":
            weights = scores[best].softmax(0)
        if ffn.router.renormalise:
            weights = weights / weights.sum()
        for expert, weight in zip(best.tolist(), weights * ffn.router.scale, strict=True):
            gate, up, down = (matrix[expert] for matrix in matrices)
            active = gated(gate @ h[row] + bias("gate", expert), up @ h[row] + bias("up", expert))
            output[row] += weight * (down @ active + bias("down", expert))
    if ffn.shared is not None:
        always = gated(h @ part["shared_gate.weight"].T, h @ part["shared_up.weight"].T)
        always = always @ part["shared_down.weight"].T
        if ffn.shared.gated:
            always = always * (h @ part["shared_switch.weight"].T).sigmoid()
        output = output + always
    return output


def _norm(norm: Norm, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    if norm.kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * (norm.offset + weight)
    return functional.layer_norm(x, x.shape[-1:], weight, weights[f"{name}.bias"], norm.epsilon)


def _attention(model: Attention, part: dict[str, Tensor], x: Tensor) -> Tensor:
    sizes = [model.heads * model.head_dim] + 2 * [model.kv_heads * model.head_dim]
    fused = x @ part["qkv.weight"].T + part.get("qkv.bias", 0)
    q, k, v = fused.split(sizes, dim=-1)
    if model.qk_norm is not None and model.qk_norm.over == "whole":
        q, k = (_norm(model.qk_norm.norm, part, f"{one}_norm", t) for one, t in (("q", q), ("k", k)))
    q, k, v = (t.view(len(x), -1, model.head_dim).transpose(0, 1) for t in (q, k, v))
    if model.qk_norm is not None and model.qk_norm.over == "head":
        q, k = (_norm(model.qk_norm.norm, part, f"{one}_norm", t) for one, t in (("q", q), ("k", k)))
    k, v = (t.repeat_interleave(model.heads // model.kv_heads, dim=0) for t in (k, v))
    if model.rope is not None:
        q, k = _rotate(model.rope, q), _rotate(model.rope, k)
    scores = q @ k.transpose(1, 2)
    if model.alibi:
        scores = scores + _alibi(model.heads, len(x))
    scores = scores * model.scale
    if model.softcap is not None:
        scores = model.softcap * (scores / model.softcap).tanh()
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    hidden = (distance < 0) | (distance >= (model.window or len(x)))
    scores = scores.masked_fill(hidden, -math.inf)
    if model.sinks:
        scores = torch.cat((scores, part["sinks"][:, None, None].expand(-1, len(x), 1)), -1)
    mixed = scores.softmax(-1)[..., : len(x)] @ v
    out = mixed.transpose(0, 1).reshape(len(x), -1)
    return out @ part["out.weight"].T + part.get("out.bias", 0)


def _rotate(rope: Rope, x: Tensor) -> Tensor:
    dims, length = rope.dims or x.shape[-1], x.shape[1]
    frequencies = torch.tensor([_frequency(rope, pair, dims, length) for pair in range(dims // 2)]).double()
    angles = torch.arange(length, dtype=torch.double)[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    if isinstance(rope.scaling, YarnScaling | LongropeScaling):
        cos, sin = cos * rope.scaling.magnitude, sin * rope.scaling.magnitude
    turned, rest = x[..., :dims], x[..., dims:]
    half = torch.cat((-turned[..., dims // 2 :], turned[..., : dims // 2]), -1)
    return torch.cat((turned * cos + half * sin, rest), -1)


def _frequency(rope: Rope, pair: int, dims: int, length: int) -> float:
    """Radians from one position to the next, by the papers."""
    plain, scaling = rope.base ** (-2 * pair / dims), rope.scaling
    stretched = plain / getattr(scaling, "factor", 1.0)
    match scaling:
        case Llama3Scaling():
            turns = scaling.original * plain / (2 * math.pi)
            keep = (turns - scaling.low) / (scaling.high - scaling.low)
        case YarnScaling():
            low, high = (
                dims * math.log(scaling.original / (2 * math.pi * turns)) / (2 * math.log(rope.base))
                for turns in (scaling.fast, scaling.slow)
            )
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dims - 1)
            keep = 1 - (pair - low) / ((high - low) or 0.001)
        case LongropeScaling():
            stretched /= (scaling.long if length > scaling.original else scaling.short)[pair]
            keep = 0
        case _:
            keep = 0
    keep = min(max(keep, 0), 1)
    return (1 - keep) * stretched + keep * plain


def _alibi(heads: int, length: int) -> Tensor:
    """Slopes of Press et al.; Falcon rounds slope and product to bfloat16, and scales with the scores."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    products = torch.tensor(slopes)[:, None].bfloat16() * torch.arange(length)
    return products[:, None, :].double()
