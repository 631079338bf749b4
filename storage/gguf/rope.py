"""How a GGUF file says that its rotary positions are scaled, as `rope_scaling` of a `config.json`.

Llama 3's scaling is a tensor of divisors, one for each frequency; phi3's long and short factors are two. The
others are metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import UnsupportedModel
from storage.gguf.header import Metadata, Packed
from storage.gguf.names import Restored
from storage.gguf.tensors import read

# Llama 3's own low and high wavelength factors, and the context that all of its kind were first trained on.
LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192
CLOSE = 1e-4  # relative; divisors are stored in float32


def scaling(
    metadata: Metadata, architecture: str, tensors: Mapping[str, Packed], rotated: int
) -> dict[str, Any] | None:
    """None without scaling. `rotated` is how many dimensions of a head turn."""
    prefix = f"{architecture}.rope.scaling"
    longest = metadata.number(f"{architecture}.context_length")
    original = metadata.number(f"{prefix}.original_context_length", 0)
    if "rope_factors_long.weight" in tensors:
        found: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": _factors(tensors, "rope_factors_long.weight", rotated),
            "short_factor": _factors(tensors, "rope_factors_short.weight", rotated),
            "original_max_position_embeddings": original or longest,
        }
        if metadata.has(f"{prefix}.attn_factor"):
            found["attention_factor"] = metadata.real(f"{prefix}.attn_factor")
        return found
    if "rope_freqs.weight" in tensors:
        base = metadata.real(f"{architecture}.rope.freq_base", 10_000.0)
        return _divided(_factors(tensors, "rope_freqs.weight", rotated), base, original, longest)
    kind = metadata.text(f"{prefix}.type", "none")
    factor = metadata.real(f"{prefix}.factor", 1.0)
    if kind == "none" or factor in {0.0, 1.0}:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or round(longest / factor),
        }
    raise UnsupportedModel(
        f"{metadata.path}: rotary positions scaled by {kind!r} are not supported; supported are linear, "
        "yarn, llama3 and longrope"
    )


def _factors(tensors: Mapping[str, Packed], name: str, rotated: int) -> list[float]:
    packed = tensors.get(name)
    if packed is None or packed.shape != (rotated // 2,) or packed.kind != "F32":
        raise UnsupportedModel(
            f"{name} of this GGUF file is missing or not {rotated // 2} values of type F32"
        )
    factors = read(Restored(name, packed), "float32")
    return [float(factor) for factor in factors]


def _divided(factors: list[float], base: float, original: int, longest: int) -> dict[str, Any] | None:
    """Llama 3's formula where it gives these divisors; else the divisors themselves, which longrope takes."""
    factor = max(factors)
    if factor == 1.0:
        return None
    for context in (original, ORIGINAL):
        if context and np.allclose(llama3_divisors(base, len(factors), factor, context), factors, rtol=CLOSE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": context,
            }
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": longest,
    }


def llama3_divisors(base: float, count: int, factor: float, original: int) -> npt.NDArray[np.float64]:
    """What each frequency is divided by: 1 for short waves, `factor` for long ones, smooth between."""
    waves = 2 * math.pi * base ** (np.arange(count) / count)
    smooth = np.clip((original / waves - LOW) / (HIGH - LOW), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors
