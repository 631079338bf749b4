"""Making the layers of a synthetic checkpoint one by one: random, planted, run, adjusted.

Each layer's weights are drawn from a generator of its own, seeded by (seed, layer, tensor), so that a
checkpoint of fewer layers is the beginning of the whole one. A calibration sequence of Zipf-distributed
tokens runs through every layer as it is made, and sets what cannot be known in advance: the scale of
what a block writes, the thresholds' common shift, and the hot-and-cold exponent.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage import architecture as canonical
from storage.architecture import NORM_PARTS, Architecture, Layer
from workers.lab.synthesis import block
from workers.lab.synthesis.activity import WARM_UP, new_per_token
from workers.lab.synthesis.planting import Planting

CALIBRATION_TOKENS = 320
EMBEDDING_CHUNK = 4096  # rows drawn at a time
EXPONENTS = (0.0, 1.1)  # searched for α; 0 is flat, and beyond 1.1 the predictor is too nearly right
SEARCH_STEPS = 6
SEARCH_NEURONS = 2048  # of each layer, that the search for α looks at
NORM_JITTER = 0.05  # of norm weights around 1, so that a forgotten norm weight shows
SMALL = 0.02  # standard deviation of biases that carry nothing


@dataclass(slots=True)
class SynthesisRecipe:
    """Everything that is fixed before the first layer is made."""

    model: Architecture
    planting: Planting
    seed: int
    dtype: torch.dtype
    biases: bool  # linear layers have biases

    @property
    def layer(self) -> Layer:
        """Any of the layers: all are alike."""
        return self.model.layers[0]

    @property
    def neurons(self) -> int:
        """Of a layer's FFN."""
        return self.layer.ffn.neurons

    def generator(self, *what: object) -> torch.Generator:
        """The random source of one tensor."""
        text = repr((self.seed, self.model.d_model, self.neurons, *what))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, scale: float, shape: tuple[int, ...], *what: object) -> Tensor:
        """Normally distributed float32 of a standard deviation."""
        return torch.randn(shape, generator=self.generator(*what)).mul_(scale)

    def rounded(self, tensor: Tensor) -> Tensor:
        """The values that the checkpoint's dtype holds, in float32."""
        return tensor.to(self.dtype).float()

    @property
    def norm_direction(self) -> Tensor | None:
        """The norms' bias b, `[d_model]`, the same in every layer; None where it carries nothing."""
        if self.biases and self.layer.attention.rope is None:
            return None
        return self.rounded(self.normal(self.planting.norm_bias, (self.model.d_model,), "norm bias"))


def calibration_tokens(recipe: SynthesisRecipe) -> Tensor:
    """Zipf-distributed ids: byte-pair vocabularies are ordered by frequency, about."""
    weights = 1 / (torch.arange(recipe.model.vocabulary) + 2.7)
    generator = recipe.generator("calibration")
    count = min(CALIBRATION_TOKENS, recipe.model.max_positions)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def first_tensors(recipe: SynthesisRecipe) -> dict[str, Tensor]:
    """Embeddings and final norm, by canonical name, in the checkpoint's dtype."""
    model, planting = recipe.model, recipe.planting
    learned = model.learned_positions is not None
    share = planting.position_energy if learned else 0.0
    tensors = {
        canonical.EMBED: _embedding(recipe, planting.stream_scale * math.sqrt(1 - share)),
        f"{canonical.FINAL_NORM}.weight": 0.1 * (1 + recipe.normal(NORM_JITTER, (model.d_model,), "final")),
        f"{canonical.FINAL_NORM}.bias": recipe.normal(SMALL, (model.d_model,), "final bias"),
    }
    if learned:
        tensors[canonical.POSITIONS] = _walk(recipe, planting.stream_scale * math.sqrt(share))
    return {name: tensor.to(recipe.dtype) for name, tensor in tensors.items()}


def _embedding(recipe: SynthesisRecipe, scale: float) -> Tensor:
    """`[vocabulary, d_model]` without a component along the norms' bias, a chunk of rows at a time."""
    model, direction = recipe.model, recipe.norm_direction
    embedding = torch.empty(model.vocabulary, model.d_model, dtype=recipe.dtype)
    generator = recipe.generator("embed")
    for start in range(0, model.vocabulary, EMBEDDING_CHUNK):
        rows = embedding[start : start + EMBEDDING_CHUNK]
        drawn = torch.randn(rows.shape, generator=generator).mul_(scale)
        rows.copy_(_without(drawn.T, direction).T)
    return embedding


def _walk(recipe: SynthesisRecipe, scale: float) -> Tensor:
    """A random walk over positions that stays on a sphere, about: `[positions, d_model]`."""
    model = recipe.model
    keep = math.exp(-1 / recipe.planting.position_memory)
    positions = model.max_positions + (model.learned_positions or 0)
    steps = recipe.normal(1.0, (positions, model.d_model), "walk")
    steps[1:] *= math.sqrt(1 - keep * keep)
    for position in range(1, steps.shape[0]):
        steps[position] += keep * steps[position - 1]
    return steps.mul_(scale)


def _without(matrix: Tensor, direction: Tensor | None) -> Tensor:
    """`[d_model, n]` with columns that have no component along `direction`; in place."""
    if direction is None:
        return matrix
    unit = direction / direction.norm()
    return matrix.sub_(torch.outer(unit, unit @ matrix))


def make_layer(recipe: SynthesisRecipe, layer: int, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One layer's tensors by canonical part, in the checkpoint's dtype, and the stream behind it.

    x is the calibration sequence's stream before the layer, `[tokens, d_model]` float32.
    """
    made = recipe.layer
    tensors = _norms(recipe, layer) | _attention(recipe, layer)
    h = block.attention_input(made, tensors, x)
    heads = block.attended(made, tensors, h)
    attended_x = _set_out(recipe, layer, tensors, heads, _rms(x))
    f = block.ffn_input(made, tensors, x, attended_x)
    active = _set_up(recipe, layer, tensors, f)
    ffn = _set_down(recipe, layer, tensors, active, _rms(x))
    x = block.block_output(made, tensors, x, attended_x, ffn)
    return {name: tensor.to(recipe.dtype) for name, tensor in tensors.items()}, x


def _rms(x: Tensor) -> float:
    return float(x[WARM_UP:].square().mean().sqrt())


def _norms(recipe: SynthesisRecipe, layer: int) -> dict[str, Tensor]:
    width, direction = (recipe.model.d_model,), recipe.norm_direction
    tensors = {}
    for name in (NORM_PARTS[place] for place in recipe.layer.norms):
        tensors[f"{name}.weight"] = recipe.rounded(1 + recipe.normal(NORM_JITTER, width, layer, name))
        bias = recipe.normal(SMALL, width, layer, name, "bias")
        tensors[f"{name}.bias"] = recipe.rounded(bias) if direction is None else direction.clone()
    return tensors


def _attention(recipe: SynthesisRecipe, layer: int) -> dict[str, Tensor]:
    """Queries, keys and values, `[rows, d_model]`. Values carry nothing that is constant."""
    model, direction = recipe.model, recipe.norm_direction
    attention, unit = recipe.layer.attention, 1 / math.sqrt(model.d_model)
    queries, keys = attention.width, attention.kv_heads * attention.head_dim

    def drawn(name: str, rows: int, scale: float) -> Tensor:
        return recipe.normal(scale * unit, (rows, model.d_model), layer, name)

    value = _without(drawn("value", keys, 1.0).T, direction).T
    if model.learned_positions is not None:
        # Equal maps: a token attends to itself and to what resembles it, its neighbours first.
        key = drawn("key", keys, math.sqrt(3 / math.sqrt(attention.head_dim)))
        query = key.clone()
    else:
        query, key = drawn("query", queries, 0.5), drawn("key", keys, 0.5)
    if attention.rope is not None:
        assert direction is not None
        constant_query, constant_key = _distance_kernel(recipe, layer)
        dual = direction / direction.square().sum()  # its product with the FFN input is 1
        query += torch.outer(constant_query, dual)
        key += torch.outer(constant_key, dual)
    tensors = {"qkv.weight": recipe.rounded(torch.cat((query, key, value)))}
    if recipe.biases:
        rows = (queries + 2 * keys,)
        tensors["qkv.bias"] = recipe.rounded(recipe.normal(SMALL, rows, layer, "qkv bias"))
    return tensors


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
    logit = planting.reach_strength * math.sqrt(attention.head_dim)
    query = torch.cat((weights * logit, torch.zeros(attention.heads, half)), dim=1)
    key = torch.cat((torch.ones(attention.kv_heads, half), torch.zeros(attention.kv_heads, half)), dim=1)
    return query.flatten(), key.flatten()


def _set_out(
    recipe: SynthesisRecipe, layer: int, tensors: dict[str, Tensor], heads: Tensor, rms: float
) -> Tensor:
    """The output projection, scaled to write the wanted energy; returns attention's output."""
    model, planting = recipe.model, recipe.planting
    energy = planting.attention_share(layer)
    out = recipe.normal(1.0, (model.d_model, heads.shape[1]), layer, "out")
    out = _without(out, recipe.norm_direction)
    out *= math.sqrt(energy) * rms / _rms(heads @ out.T)
    tensors["out.weight"] = recipe.rounded(out)
    if recipe.biases:
        bias = recipe.normal(SMALL * rms, (model.d_model,), layer, "out bias")
        tensors["out.bias"] = recipe.rounded(bias)
    return torch.nn.functional.linear(heads, tensors["out.weight"], tensors.get("out.bias"))


def _set_up(recipe: SynthesisRecipe, layer: int, tensors: dict[str, Tensor], f: Tensor) -> Tensor:
    """The up-projection with its thresholds; returns the activations `[tokens, d_ff]`."""
    model, planting = recipe.model, recipe.planting
    rank = planting.rank(model.d_model)
    spanning = recipe.normal(1.0, (model.d_model, rank), layer, "basis")
    basis = torch.linalg.qr(_without(spanning, recipe.norm_direction))[0]
    rows = recipe.normal(1.0, (recipe.neurons, rank), layer, "rows")
    rows /= rows.norm(dim=1, keepdim=True)
    up = recipe.normal(
        planting.noise / math.sqrt(model.d_model), (recipe.neurons, model.d_model), layer, "up"
    )
    up = _without(up.T, recipe.norm_direction).T if recipe.norm_direction is not None else up
    up.addmm_(rows, basis.T)
    pre = f @ up.T
    theta = torch.zeros(recipe.neurons)
    if recipe.layer.ffn.sparse:
        theta = _thresholds(recipe, layer, seen=(f @ basis) @ rows.T, pre=pre)
    if recipe.biases:
        tensors["up.bias"] = recipe.rounded(-theta)
        pre += tensors["up.bias"]
    else:
        direction = recipe.norm_direction
        assert direction is not None
        dual = direction / direction.square().sum()
        up -= torch.outer(theta, dual)
        pre -= torch.outer(f @ dual, theta)
    tensors["up.weight"] = up
    return block.activated(recipe.layer, pre)


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
    recipe: SynthesisRecipe, layer: int, tensors: dict[str, Tensor], active: Tensor, rms: float
) -> Tensor:
    """The down-projection, scaled likewise, without what the mean activation would write in every token."""
    model, planting = recipe.model, recipe.planting
    matrix = _without(
        recipe.normal(1.0, (model.d_model, recipe.neurons), layer, "down"), recipe.norm_direction
    )
    mean = active[WARM_UP:].mean(dim=0)
    matrix.sub_(torch.outer(matrix @ mean, mean / mean.square().sum().clamp(min=1e-12)))
    matrix *= math.sqrt(planting.ffn_energy) * rms / _rms(active @ matrix.T)
    tensors["down.weight"] = matrix
    if recipe.biases:
        bias = recipe.normal(SMALL * rms, (model.d_model,), layer, "down bias")
        tensors["down.bias"] = recipe.rounded(bias)
    return block.down(tensors, active)
