"""SmolLM 3: Llama's block, with no rotary positions in every fourth layer."""

from __future__ import annotations

from typing import Any

from storage.architecture import Architecture, Layer
from storage.errors import UnsupportedModel
from storage.families import decoder, rope
from storage.families.family import Settings, flag, layer_count, number

THETA = 2_000_000.0
DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32_768, "tie_word_embeddings": True}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    rotated = _rotated(config)
    windowed = flag(config, "use_sliding_window", False) and config.get("sliding_window") is not None
    layers = [
        Layer(
            attention=decoder.attention(
                config,
                positions if rotated[index] else None,
                window=number(config, "sliding_window") if windowed and slides else None,
            ),
            ffn=decoder.gated(config),
            norms=dict.fromkeys(decoder.BEFORE, norm),
        )
        for index, slides in enumerate(decoder.sliding(config, lambda index: not rotated[index]))
    ]
    return decoder.architecture(config, "smollm3", layers, norm)


def _rotated(config: Settings) -> list[bool]:
    """Which layers have rotary positions."""
    count, given = layer_count(config), config.get("no_rope_layers")
    if given is None:
        interval = number(config, "no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(count)]
    values: list[Any] = given if isinstance(given, list) else []
    if len(values) < count or any(value not in (0, 1) for value in values):
        raise UnsupportedModel(f"config.json: no_rope_layers must be {count} of 0 and 1, not {given!r}")
    return [value == 1 for value in values[:count]]


SMOLLM3 = decoder.family("smollm3", architecture)
