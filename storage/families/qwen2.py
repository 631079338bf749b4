"""Qwen 2 and 2.5: Llama's block with biases of queries, keys and values, and windows in the upper layers."""

from __future__ import annotations

from storage.architecture import Architecture, Layer, QkNorm
from storage.families import decoder, rope
from storage.families.family import Settings, count, flag, number

THETA = 10_000.0
DEFAULTS = {"max_position_embeddings": 32_768, "sliding_window": 4096}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    return described({**DEFAULTS, **config}, "qwen2", None)


def described(config: Settings, family: str, qk_norm: QkNorm | None) -> Architecture:
    """Also of Qwen 3, which adds the norm of queries and keys."""
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    windowed = flag(config, "use_sliding_window", False) and config["sliding_window"] is not None
    first = count(config, "max_window_layers", 28)
    layers = [
        Layer(
            attention=decoder.attention(
                config,
                positions,
                window=number(config, "sliding_window") if windowed and slides else None,
                qk_norm=qk_norm,
            ),
            ffn=decoder.gated(config),
            norms=dict.fromkeys(decoder.BEFORE, norm),
        )
        for slides in decoder.sliding(config, lambda index: index >= first)
    ]
    return decoder.architecture(config, family, layers, norm)


QWEN2 = decoder.family("qwen2", architecture, biases=lambda _: decoder.Biases(qkv=True))
