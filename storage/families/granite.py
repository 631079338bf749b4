"""Granite 3: Llama's block with scaled embeddings, attention, branches and logits."""

from __future__ import annotations

from storage.architecture import Architecture, Layer
from storage.families import decoder, rope
from storage.families.family import Settings, layer_count, real

THETA = 10_000.0


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    layer = Layer(
        attention=decoder.attention(config, positions, scale=real(config, "attention_multiplier", 1.0)),
        ffn=decoder.gated(config),
        norms=dict.fromkeys(decoder.BEFORE, norm),
        branch_scale=real(config, "residual_multiplier", 1.0),
    )
    return decoder.architecture(
        config,
        "granite",
        (layer,) * layer_count(config),
        norm,
        embedding_scale=real(config, "embedding_multiplier", 1.0),
        logit_scale=1 / real(config, "logits_scaling", 1.0),
    )


GRANITE = decoder.family("granite", architecture)
