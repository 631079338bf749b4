"""Mistral (arXiv 2310.06825): Llama's block without biases, every layer with a window where one is given."""

from __future__ import annotations

from storage.architecture import Architecture, Layer
from storage.families import decoder, rope
from storage.families.family import Settings, layer_count, number

THETA = 10_000.0
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    window = None if config["sliding_window"] is None else number(config, "sliding_window")
    layer = Layer(
        attention=decoder.attention(config, positions, window=window),
        ffn=decoder.gated(config),
        norms=dict.fromkeys(decoder.BEFORE, norm),
    )
    layers = (layer,) * layer_count(config)
    return decoder.architecture(config, "mistral", layers, norm)


MISTRAL = decoder.family("mistral", architecture, biases=lambda _: decoder.Biases())
