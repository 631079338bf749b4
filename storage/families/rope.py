"""Rotary positions as configs describe them: one base, and what stretches them to longer contexts.

Since transformers 5, `rope_parameters` holds everything; before, `rope_theta` and `partial_rotary_factor`
stood at the top and `rope_scaling` held the rest. Both are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from storage.architecture import (
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Rope,
    Scaling,
    YarnScaling,
)
from storage.errors import UnsupportedModel
from storage.families.family import Settings, flag, number, real


def parameters(config: Settings, kind: str | None = None) -> Settings:
    """What is said of rotary positions, of the layers of one `kind` where those differ; may be empty."""
    found: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if kind is not None and isinstance(found, dict) and kind in found:
        found = found[kind] or {}
    if not isinstance(found, dict):
        raise UnsupportedModel(f"config.json: rope parameters must be an object, not {found!r}")
    return found


def rope(config: Settings, given: Settings, head_dim: int, base: float) -> Rope:
    """Raises UnsupportedModel naming a type that is not supported. `base` is the family's default."""
    share = real(given, "partial_rotary_factor", real(config, "partial_rotary_factor", 1.0))
    dims = int(head_dim * share)
    if dims % 2 or not 0 < dims <= head_dim:
        raise UnsupportedModel(
            f"rotary positions of {dims} dimensions in heads of {head_dim} are not supported"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    theta = real(given, "rope_theta", real(config, "rope_theta", base))
    if kind == "default":
        scaling = None
    elif isinstance(kind, str) and kind in SCALINGS:
        scaling = SCALINGS[kind](config, given, dims)
    else:
        raise UnsupportedModel(
            f"rotary positions of type {kind!r} are not supported; "
            f"supported are default, {', '.join(SCALINGS)}"
        )
    return Rope(theta, None if dims == head_dim else dims, scaling)


def _original(config: Settings, given: Settings) -> int:
    """The context that the model was trained with at first."""
    key = "original_max_position_embeddings"
    return number(config, key, number(given, key, number(config, "max_position_embeddings")))


def _factor(config: Settings, given: Settings) -> float:
    """By how much the context has grown."""
    return real(given, "factor", number(config, "max_position_embeddings") / _original(config, given))


def _linear(config: Settings, given: Settings, dims: int) -> Scaling:
    return LinearScaling(real(given, "factor"))


def _llama3(config: Settings, given: Settings, dims: int) -> Scaling:
    return Llama3Scaling(
        factor=real(given, "factor"),
        low=real(given, "low_freq_factor"),
        high=real(given, "high_freq_factor"),
        original=_original(config, given),
    )


def _yarn(config: Settings, given: Settings, dims: int) -> Scaling:
    factor = _factor(config, given)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    usual = magnitude(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        usual = magnitude(real(given, "mscale")) / magnitude(real(given, "mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original=_original(config, given),
        fast=real(given, "beta_fast", 32.0),
        slow=real(given, "beta_slow", 1.0),
        truncate=flag(given, "truncate", True),
        magnitude=real(given, "attention_factor", usual),
    )


def _longrope(config: Settings, given: Settings, dims: int) -> Scaling:
    factor, original = _factor(config, given), _original(config, given)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongropeScaling(
        short=_factors(given, "short_factor", dims // 2),
        long=_factors(given, "long_factor", dims // 2),
        original=original,
        magnitude=real(given, "attention_factor", usual),
    )


def _factors(given: Settings, key: str, count: int) -> tuple[float, ...]:
    values = given.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise UnsupportedModel(f"config.json: {key} must be {count} numbers, one for each angle")
    return tuple(real({key: value}, key) for value in values)


SCALINGS: dict[str, Callable[[Settings, Settings, int], Scaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
