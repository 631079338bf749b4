"""OLMo 2 (arXiv 2501.00656): norms of the sub-layers' outputs alone, and of all queries and keys together."""

from __future__ import annotations

from storage.architecture import Architecture, Layer, NormPlace, QkNorm
from storage.families import decoder, rope
from storage.families.family import Settings, layer_count

THETA = 10_000.0
DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
NORMS: dict[NormPlace, str] = {
    "attention_output": "post_attention_layernorm",
    "ffn_output": "post_feedforward_layernorm",
}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    layer = Layer(
        attention=decoder.attention(config, positions, qk_norm=QkNorm(norm, "whole")),
        ffn=decoder.gated(config),
        norms=dict.fromkeys(NORMS, norm),
    )
    layers = (layer,) * layer_count(config)
    return decoder.architecture(config, "olmo2", layers, norm)


OLMO2 = decoder.family("olmo2", architecture, norms=NORMS)
