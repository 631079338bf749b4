"""Llama 2 and 3, and what has their form: TinyLlama, SmolLM2, distilled models, ReluLLaMA, ProSparse."""

from __future__ import annotations

from storage.architecture import Architecture, Layer
from storage.families import decoder, rope
from storage.families.family import Settings, layer_count

THETA = 10_000.0


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    layer = Layer(
        attention=decoder.attention(config, positions),
        ffn=decoder.gated(config),
        norms=dict.fromkeys(decoder.BEFORE, norm),
    )
    layers = (layer,) * layer_count(config)
    return decoder.architecture(config, "llama", layers, norm)


LLAMA = decoder.family("llama", architecture)
SPARSELLAMA = decoder.family("sparsellama", architecture)  # ProSparse, of which transformers knows nothing
