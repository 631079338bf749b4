"""OLMoE (arXiv 2409.02060): Llama's block, queries and keys normed over all heads, 64 experts, 8 a token."""

from __future__ import annotations

from storage.architecture import Architecture, Layer, QkNorm, Router
from storage.families import decoder, experts, rope
from storage.families.family import Settings, flag, layer_count, number

THETA = 10_000.0
DEFAULTS = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "eos_token_id": 50279,
}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    decoder.refuse(config, "clip_qkv")
    norm = decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    router = Router(number(config, "num_experts_per_tok"), renormalise=flag(config, "norm_topk_prob", False))
    dense = decoder.gated(config)
    layer = Layer(
        attention=decoder.attention(config, positions, qk_norm=QkNorm(norm, "whole")),
        ffn=experts.experts(config, router, dense.neurons, dense),
        norms=dict.fromkeys(decoder.BEFORE, norm),
    )
    layers = (layer,) * layer_count(config)
    return decoder.architecture(config, "olmoe", layers, norm)


OLMOE = decoder.family("olmoe", architecture, experts=experts.Names())
