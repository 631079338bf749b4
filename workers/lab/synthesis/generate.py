"""Making the layers of a synthetic checkpoint one by one: random, planted, run, adjusted.

Each layer's weights are drawn from a generator of its own, seeded by (seed, layer, tensor), so that a
checkpoint of fewer layers is the beginning of the whole one. A calibration sequence of Zipf-distributed
tokens runs through every layer as it is made, and sets what cannot be known in advance: the scale of
what a block writes, the thresholds' common shift, and the hot-and-cold exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.architecture import NORM_PARTS, NormPlace
from storage.layout import Role
from workers.lab.synthesis import block
from workers.lab.synthesis.activity import WARM_UP, new_per_token
from workers.lab.synthesis.embeddings import NORM_JITTER, SMALL
from workers.lab.synthesis.recipe import Constant, SynthesisRecipe, without

EXPONENTS = (0.0, 1.1)  # searched for α; 0 is flat, and beyond 1.1 the predictor is too nearly right
SEARCH_STEPS = 6
SEARCH_NEURONS = 2048  # of each layer, that the search for α looks at


@dataclass(frozen=True, slots=True)
class Half:
    """One half of a layer: its tensors by canonical part, in the checkpoint's dtype, and what it computes.

    `x` `[tokens, d_model]` float32 is attention's output, before the residual is added, or the stream behind
    the layer.
    """

    tensors: dict[str, Tensor]
    x: Tensor


def make_attention(recipe: SynthesisRecipe, layer: int, x: Tensor) -> Half:
    """A layer's attention and all of its norms.

    x is the calibration sequence's stream before the layer, `[tokens, d_model]` float32.
    """
    tensors = _norms(recipe, layer)
    h = block.attention_input(recipe.layer, tensors, x)
    tensors |= _attention(recipe, layer, recipe.constant(tensors, "attention_input", h))
    heads = block.attended(recipe.layer, tensors, h)
    attended_x = _set_out(recipe, layer, tensors, heads, _moving(recipe, x))
    return Half(_stored(recipe, tensors), attended_x)


def make_ffn(recipe: SynthesisRecipe, layer: int, x: Tensor, attention: Half) -> Half:
    """A layer's FFN, behind its `attention`, whose matrices are not looked at."""
    made, level = recipe.layer, _moving(recipe, x)
    norms = _norms(recipe, layer)
    tensors = dict(norms)
    f = block.ffn_input(made, norms, x, attention.x)
    active = _set_rows(recipe, layer, tensors, f)
    ffn = _set_down(recipe, layer, tensors, active, level)
    x = block.block_output(made, norms, x, attention.x, ffn)
    return Half(_stored(recipe, {name: one for name, one in tensors.items() if name not in norms}), x)


def _stored(recipe: SynthesisRecipe, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(recipe.dtype) for name, tensor in tensors.items()}


def _rms(x: Tensor) -> float:
    return float(x[WARM_UP:].square().mean().sqrt())


def _moving(recipe: SynthesisRecipe, x: Tensor) -> float:
    """Root mean square of what is not constant in the stream x `[tokens, d_model]`."""
    return _rms(without(x.T.clone(), recipe.direction).T)


def _norms(recipe: SynthesisRecipe, layer: int) -> dict[str, Tensor]:
    width, direction, attention = (recipe.model.d_model,), recipe.direction, recipe.layer.attention
    tensors = {}
    for place, norm in recipe.layer.norms.items():
        name = NORM_PARTS[place]
        around_one = 1 + recipe.normal(NORM_JITTER, width, layer, name) - norm.offset
        tensors[f"{name}.weight"] = recipe.rounded(around_one)
        if norm.kind == "layer":
            bias = recipe.normal(SMALL, width, layer, name, "bias")
            tensors[f"{name}.bias"] = recipe.rounded(bias) if direction is None else direction.clone()
    if attention.qk_norm is not None:
        for one, heads in (("q", attention.heads), ("k", attention.kv_heads)):
            size = attention.head_dim * (1 if attention.qk_norm.over == "head" else heads)
            jitter = recipe.normal(NORM_JITTER, (size,), layer, f"{one} norm")
            tensors[f"{one}_norm.weight"] = recipe.rounded(1 + jitter)
    return tensors


def _attention(recipe: SynthesisRecipe, layer: int, constant: Constant | None) -> dict[str, Tensor]:
    """Queries, keys and values, `[rows, d_model]`. Values carry nothing that is constant."""
    model = recipe.model
    attention, unit = recipe.layer.attention, 1 / math.sqrt(model.d_model)
    queries, keys = attention.width, attention.kv_heads * attention.head_dim

    def drawn(name: str, rows: int, scale: float) -> Tensor:
        return recipe.normal(scale * unit, (rows, model.d_model), layer, name)

    value = without(drawn("value", keys, 1.0).T, _along(constant)).T
    if model.learned_positions is not None:
        # Equal maps: a token attends to itself and to what resembles it, its neighbours first.
        key = drawn("key", keys, math.sqrt(3 / math.sqrt(attention.head_dim)))
        query = key.clone()
    else:
        query, key = drawn("query", queries, 0.5), drawn("key", keys, 0.5)
    if attention.rope is not None:
        assert constant is not None
        constant_query, constant_key = _distance_kernel(recipe, layer)
        query += torch.outer(constant_query, constant.dual)
        key += torch.outer(constant_key, constant.dual)
    tensors = {"qkv.weight": recipe.rounded(torch.cat((query, key, value)))}
    if "qkv.bias" in recipe.parts:
        rows = (queries + 2 * keys,)
        tensors["qkv.bias"] = recipe.rounded(recipe.normal(SMALL, rows, layer, "qkv bias"))
    return tensors


def _along(constant: Constant | None) -> Tensor | None:
    return None if constant is None else constant.along


def _distance_kernel(recipe: SynthesisRecipe, layer: int) -> tuple[Tensor, Tensor]:
    """Constant queries `[heads · head_dim]` and keys `[kv_heads · head_dim]` that see distance alone.

    Rotation by ω a token makes the product of constants Σ_j q_j k_j cos(ω_j Δ). Each head puts its
    queries on frequencies around the inverse of its own reach.
    """
    attention, planting = recipe.layer.attention, recipe.planting
    assert attention.rope is not None
    half = attention.head_dim // 2
    frequencies = attention.rope.base ** (-torch.arange(half) / half)  # radians per token
    spread = torch.rand(attention.heads, generator=recipe.generator(layer, "reach"))
    reach = planting.attention_reach * 2 ** (2 * spread - 1)  # tokens, half to twice the preset's
    distance = torch.log(torch.outer(reach, frequencies))  # 0 where ω · reach is 1
    weights = torch.exp(-(distance**2) / 2)
    weights /= weights.sum(dim=1, keepdim=True)
    logit = planting.reach_strength / attention.scale
    query = torch.cat((weights * logit, torch.zeros(attention.heads, half)), dim=1)
    key = torch.cat((torch.ones(attention.kv_heads, half), torch.zeros(attention.kv_heads, half)), dim=1)
    return query.flatten(), key.flatten()


def _set_out(
    recipe: SynthesisRecipe, layer: int, tensors: dict[str, Tensor], heads: Tensor, level: float
) -> Tensor:
    """The output projection, scaled to write the wanted energy; returns attention's output.

    `level` is the stream's root mean square.
    """
    model, planting = recipe.model, recipe.planting
    energy = planting.attention_share(layer)
    out = recipe.normal(1.0, (model.d_model, heads.shape[1]), layer, "out")
    out = without(out, recipe.direction)
    out *= math.sqrt(energy) * level / (recipe.layer.branch_scale * _rms(heads @ out.T))
    tensors["out.weight"] = recipe.rounded(out)
    if "out.bias" in recipe.parts:
        bias = recipe.normal(SMALL * level, (model.d_model,), layer, "out bias")
        tensors["out.bias"] = recipe.rounded(bias)
    return torch.nn.functional.linear(heads, tensors["out.weight"], tensors.get("out.bias"))


def _set_rows(recipe: SynthesisRecipe, layer: int, tensors: dict[str, Tensor], f: Tensor) -> Tensor:
    """The FFN's gate and up rows; returns the activations `[tokens, d_ff]`."""
    ffn, constant = recipe.layer.ffn, recipe.constant(tensors, _ffn_norm(recipe), f)
    made: dict[Role, Tensor] = {}
    if ffn.kind == "gated":
        width = recipe.model.d_model
        up = recipe.normal(1 / math.sqrt(width), (recipe.neurons, width), layer, "linear up")
        tensors["up.weight"] = without(up.T, _along(constant)).T
        made["up"] = f @ tensors["up.weight"].T
    role = ffn.deciding[0]
    made[role] = _set_deciding(recipe, layer, tensors, f, role, constant)
    return block.activated(ffn, made)


def _ffn_norm(recipe: SynthesisRecipe) -> NormPlace:
    """The norm that makes the FFN's input."""
    return "ffn_input" if "ffn_input" in recipe.layer.norms else "attention_input"


def _set_deciding(
    recipe: SynthesisRecipe,
    layer: int,
    tensors: dict[str, Tensor],
    f: Tensor,
    role: Role,
    constant: Constant | None,
) -> Tensor:
    """The projection that decides which neurons are active, with its thresholds; returns f's products."""
    model, planting, along = recipe.model, recipe.planting, _along(constant)
    rank = planting.rank(model.d_model)
    spanning = recipe.normal(1.0, (model.d_model, rank), layer, "basis")
    basis = torch.linalg.qr(without(spanning, along))[0]
    rows = recipe.normal(1.0, (recipe.neurons, rank), layer, "rows")
    rows /= rows.norm(dim=1, keepdim=True)
    matrix = recipe.normal(
        planting.noise / math.sqrt(model.d_model), (recipe.neurons, model.d_model), layer, "up"
    )
    matrix = without(matrix.T, along).T
    matrix.addmm_(rows, basis.T)
    pre = f @ matrix.T
    theta = torch.zeros(recipe.neurons)
    if recipe.layer.ffn.sparse:
        theta = _thresholds(recipe, layer, seen=(f @ basis) @ rows.T, pre=pre)
        theta -= recipe.layer.ffn.threshold  # which has to be exceeded anyway
    if f"{role}.bias" in recipe.parts:
        tensors[f"{role}.bias"] = recipe.rounded(-theta)
        pre += tensors[f"{role}.bias"]
    else:
        assert constant is not None
        matrix -= torch.outer(theta, constant.dual)
        pre -= torch.outer(f @ constant.dual, theta)
    tensors[f"{role}.weight"] = matrix
    return pre


def _thresholds(recipe: SynthesisRecipe, layer: int, *, seen: Tensor, pre: Tensor) -> Tensor:
    """θ `[d_ff]`, so that activity, and the predicted set's renewal, are the planting's.

    `seen` is the part of the pre-activations `pre` that a truncated SVD sees, both `[tokens, d_ff]`.
    Renewal falls as α grows, because hot neurons stay; the search ends at a bound where the drift
    alone renews more or less than wanted.
    """
    order = torch.randperm(recipe.neurons, generator=recipe.generator(layer, "heat"))
    some = slice(min(SEARCH_NEURONS, recipe.neurons))  # a fair sample: the order is random
    low, high = EXPONENTS
    for _ in range(SEARCH_STEPS):
        exponent = (low + high) / 2
        theta = _theta(recipe, order[some], exponent, pre[:, some])
        if _renewal(recipe, seen[:, some] - theta, pre[:, some] - theta) > recipe.planting.new:
            low = exponent
        else:
            high = exponent
    return _theta(recipe, order, (low + high) / 2, pre)


def _theta(recipe: SynthesisRecipe, order: Tensor, exponent: float, pre: Tensor) -> Tensor:
    """Thresholds of power-law neurons, shifted together until the mean activity is the planting's.

    `order` is each neuron's place from hot to cold, of all d_ff; `pre` is theirs, `[tokens, len(order)]`.
    """
    planting, d_ff = recipe.planting, recipe.neurons
    heat = (torch.arange(d_ff) + d_ff / 64) ** -exponent
    wanted = (heat * (planting.active / heat.mean())).clamp(max=planting.hottest)[order]
    # One deviation for all rows: they have one length, and a sequence has few independent moments.
    theta: Tensor = torch.special.ndtri(1 - wanted) * float(pre.square().mean().sqrt())
    # Mean activity falls as all thresholds rise together: the shift is a quantile of what exceeds them.
    excess = (pre - theta)[WARM_UP:].flatten()
    count = max(1, round(planting.active * excess.numel()))
    return theta + float(np.partition(excess.numpy(), -count)[-count])


def _renewal(recipe: SynthesisRecipe, seen: Tensor, pre: Tensor) -> float:
    """New predicted neurons per token and d_ff, of a predictor that sees `seen` alone."""
    planting = recipe.planting
    scores = seen[WARM_UP:][pre[WARM_UP:] > 0].numpy()
    count = int(planting.misses * scores.size)
    predicted = seen >= float(np.partition(scores, count)[count])
    return new_per_token(predicted, planting.window)


def _set_down(
    recipe: SynthesisRecipe, layer: int, tensors: dict[str, Tensor], active: Tensor, level: float
) -> Tensor:
    """The down-projection, scaled likewise, without what the mean activation would write in every token."""
    model, planting = recipe.model, recipe.planting
    matrix = without(recipe.normal(1.0, (model.d_model, recipe.neurons), layer, "down"), recipe.direction)
    mean = active[WARM_UP:].mean(dim=0)
    matrix.sub_(torch.outer(matrix @ mean, mean / mean.square().sum().clamp(min=1e-12)))
    matrix *= math.sqrt(planting.ffn_energy) * level / (recipe.layer.branch_scale * _rms(active @ matrix.T))
    tensors["down.weight"] = matrix
    if "down.bias" in recipe.parts:
        bias = recipe.normal(SMALL * level, (model.d_model,), layer, "down bias")
        tensors["down.bias"] = recipe.rounded(bias)
    return block.down(tensors, active)
