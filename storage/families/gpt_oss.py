"""gpt-oss (arXiv 2508.10925): experts in MXFP4 with clamped gates and biases, and a sink in each head.

Every other layer, the first among them, sees a window. Checkpoints have a form of their own (`laced.py`).
"""

from __future__ import annotations

from dataclasses import replace

from storage.architecture import Architecture, Ffn, Layer, Router
from storage.families import decoder, experts, laced, rope
from storage.families.family import Settings, flag, number, real

DEFAULTS = {
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
BASE = 150_000.0


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    given = rope.parameters(config) or ROPE
    usual = decoder.attention(config, rope.rope(config, given, decoder.head_dim(config), BASE))
    attention = replace(usual, sinks=True)
    local = replace(attention, window=number(config, "sliding_window", 128))
    router = Router(number(config, "num_experts_per_tok"), over="chosen")
    ffn = _clamped(
        config, experts.experts(config, router, number(config, "intermediate_size"), decoder.gated(config))
    )
    norm = decoder.rms(config)
    layers = (
        Layer(local if windowed else attention, ffn, {"attention_input": norm, "ffn_input": norm})
        for windowed in decoder.sliding(config, lambda index: index % 2 == 0)
    )
    return decoder.architecture(config, "gpt_oss", layers, norm)


def _clamped(config: Settings, ffn: Ffn) -> Ffn:
    return replace(
        ffn,
        activation="clamped_silu",
        up_activation="clamped",
        limit=real(config, "swiglu_limit", 7.0),
        alpha=real(config, "swiglu_alpha", 1.702),
    )


def _biases(config: Settings) -> decoder.Biases:
    both = flag(config, "attention_bias", True)
    return decoder.Biases(both, both)


GPT_OSS = replace(
    decoder.family(
        "gpt_oss", architecture, biases=_biases, experts=experts.Names(router="router", biases=True)
    ),
    published=laced.opened,
    quantised=("mxfp4",),
)
