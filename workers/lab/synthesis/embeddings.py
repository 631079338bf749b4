"""The tensors of a synthetic checkpoint that belong to no layer: embedding, positions, final norm, head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from storage import architecture as canonical
from workers.lab.synthesis.recipe import SynthesisRecipe, without

CHUNK = 4096  # rows drawn at a time
NORM_JITTER = 0.05  # of norm weights around 1, so that a forgotten norm weight shows
SMALL = 0.02  # standard deviation of biases that carry nothing
LOGITS = 0.1  # of the final norm's weights: logits of an embedding's size deviate by about 2


def first_names(recipe: SynthesisRecipe) -> tuple[str, ...]:
    """The canonical names of these tensors."""
    names = [canonical.EMBED, f"{canonical.FINAL_NORM}.weight"]
    if not recipe.rms:
        names.append(f"{canonical.FINAL_NORM}.bias")
    if _walked(recipe):
        names.append(canonical.POSITIONS)
    if not recipe.model.tied_head:
        names.append(canonical.HEAD)
    return tuple(names)


def first_tensor(recipe: SynthesisRecipe, name: str) -> Tensor:
    """One of them, in the checkpoint's dtype."""
    return _drawn(recipe, name).to(recipe.dtype)


def _walked(recipe: SynthesisRecipe) -> float:
    """Share of the first layer's input that positions have."""
    return recipe.planting.position_energy if recipe.model.learned_positions is not None else 0.0


def _drawn(recipe: SynthesisRecipe, name: str) -> Tensor:
    model, planting, walked = recipe.model, recipe.planting, _walked(recipe)
    if name == canonical.EMBED:
        constant = planting.constant_energy if recipe.rms else 0.0
        scale = planting.stream_scale * math.sqrt(1 - walked - constant)
        height = planting.stream_scale * math.sqrt(constant * model.d_model)
        return _rows(recipe, "embed", scale / model.embedding_scale, height / model.embedding_scale)
    if name == canonical.HEAD:
        return _rows(recipe, "head", planting.stream_scale, 0.0)
    if name == canonical.POSITIONS:
        return _walk(recipe, planting.stream_scale * math.sqrt(walked))
    if name == f"{canonical.FINAL_NORM}.bias":
        return recipe.normal(SMALL, (model.d_model,), "final bias")
    assert name == f"{canonical.FINAL_NORM}.weight", f"no tensor is called {name}"
    # A tied head multiplies with the embedding as it is stored, not as it is scaled.
    level = LOGITS * (model.embedding_scale if model.tied_head else 1.0) / model.logit_scale
    return level * (1 + recipe.normal(NORM_JITTER, (model.d_model,), "final"))


def _rows(recipe: SynthesisRecipe, name: str, scale: float, height: float) -> Tensor:
    """`[vocabulary, d_model]`, each row's component along the constant direction `height`.

    Made a chunk of rows at a time.
    """
    model, direction = recipe.model, recipe.direction
    made = torch.empty(model.vocabulary, model.d_model, dtype=recipe.dtype)
    generator = recipe.generator(name)
    for start in range(0, model.vocabulary, CHUNK):
        rows = made[start : start + CHUNK]
        drawn = torch.randn(rows.shape, generator=generator).mul_(scale)
        drawn = without(drawn.T, direction).T
        rows.copy_(drawn if direction is None else drawn.add_(direction, alpha=height))
    return made


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
