"""Qwen 3 (arXiv 2505.09388): Qwen 2 with a norm of each query and key head in the place of the biases."""

from __future__ import annotations

from storage.architecture import Architecture, QkNorm
from storage.families import decoder, qwen2
from storage.families.family import Settings

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    return qwen2.described(config, "qwen3", QkNorm(decoder.rms(config), "head"))


QWEN3 = decoder.family("qwen3", architecture)
