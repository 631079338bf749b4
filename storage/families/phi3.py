"""Phi 3 and 4 mini: Llama's block with fused projections, longrope positions, of part of a head in Phi 4."""

from __future__ import annotations

from storage.architecture import Architecture, Layer
from storage.families import decoder, rope
from storage.families.family import Settings, layer_count, number

THETA = 10_000.0
DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    norm = decoder.rms(config)
    given = dict(rope.parameters(config))
    if given.get("rope_type", given.get("type")) in ("su", "yarn"):  # its older names
        given["rope_type"] = "longrope"
    positions = rope.rope(config, given, decoder.head_dim(config), THETA)
    window = None if config.get("sliding_window") is None else number(config, "sliding_window")
    layer = Layer(
        attention=decoder.attention(config, positions, window=window),
        ffn=decoder.gated(config),
        norms=dict.fromkeys(decoder.BEFORE, norm),
    )
    layers = (layer,) * layer_count(config)
    return decoder.architecture(config, "phi3", layers, norm)


PHI3 = decoder.family("phi3", architecture, biases=lambda _: decoder.Biases(), fused=True)
