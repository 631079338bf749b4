"""Gemma 2 (arXiv 2408.00118): norms around both sub-layers, softcaps, a window in every other layer."""

from __future__ import annotations

import math

from storage.architecture import Architecture, Layer, NormPlace
from storage.families import decoder, rope
from storage.families.family import Settings, number, real

THETA = 10_000.0
DEFAULTS = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
NORMS: dict[NormPlace, str] = {
    "attention_input": "input_layernorm",
    "attention_output": "post_attention_layernorm",
    "ffn_input": "pre_feedforward_layernorm",
    "ffn_output": "post_feedforward_layernorm",
}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    decoder.refuse(config, "use_bidirectional_attention")
    norm = decoder.rms(config, offset=1)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), THETA)
    layers = [
        Layer(
            attention=decoder.attention(
                config,
                positions,
                scale=1 / math.sqrt(real(config, "query_pre_attn_scalar")),
                window=number(config, "sliding_window") if slides else None,
                softcap=decoder.optional(config, "attn_logit_softcapping"),
            ),
            ffn=decoder.gated(config, "hidden_activation", "gelu_pytorch_tanh"),
            norms=dict.fromkeys(NORMS, norm),
        )
        for slides in decoder.sliding(config, lambda index: index % 2 == 0)
    ]
    return decoder.architecture(
        config,
        "gemma2",
        layers,
        norm,
        embedding_scale=math.sqrt(number(config, "hidden_size")),
        logit_softcap=decoder.optional(config, "final_logit_softcapping"),
    )


GEMMA2 = decoder.family("gemma2", architecture, norms=NORMS)
