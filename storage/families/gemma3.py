"""Gemma 3 (arXiv 2503.19786): Gemma 2 with norms of query and key heads in the place of the softcaps.

Five layers with a window and short-range positions, then one with all tokens and long-range ones. The text
model stands alone (`gemma3_text`) or in a checkpoint that also reads images (`gemma3`), which are left out.
"""

from __future__ import annotations

import math
from typing import Any

from storage.architecture import Architecture, Layer, QkNorm
from storage.errors import UnsupportedModel
from storage.families import decoder, rope
from storage.families.decoder import Biases
from storage.families.family import Settings, number, real
from storage.families.gemma2 import NORMS

GLOBAL, LOCAL = 1_000_000.0, 10_000.0  # rotary bases
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def text(config: Settings) -> Settings:
    """What describes the text model, with the defaults of its class."""
    inner: Any = config.get("text_config", config)
    if not isinstance(inner, dict):
        raise UnsupportedModel(f"config.json: text_config must be an object, not {inner!r}")
    outer = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    return {**DEFAULTS, **inner, **outer}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = text(config)
    for option in ("use_bidirectional_attention", "attn_logit_softcapping"):
        decoder.refuse(config, option)
    norm, head_dim = decoder.rms(config, offset=1), decoder.head_dim(config)
    everywhere = rope.rope(config, rope.parameters(config, "full_attention"), head_dim, GLOBAL)
    nearby = rope.rope({}, _nearby(config), head_dim, LOCAL)
    pattern = number(config, "sliding_window_pattern")
    layers = [
        Layer(
            attention=decoder.attention(
                config,
                nearby if slides else everywhere,
                scale=1 / math.sqrt(real(config, "query_pre_attn_scalar")),
                window=number(config, "sliding_window") if slides else None,
                qk_norm=QkNorm(norm, "head"),
            ),
            ffn=decoder.gated(config, "hidden_activation", "gelu_pytorch_tanh"),
            norms=dict.fromkeys(NORMS, norm),
        )
        for slides in decoder.sliding(config, lambda index: (index + 1) % pattern != 0)
    ]
    return decoder.architecture(
        config,
        "gemma3_text",
        layers,
        norm,
        embedding_scale=math.sqrt(number(config, "hidden_size")),
        logit_softcap=decoder.optional(config, "final_logit_softcapping"),
    )


def _nearby(config: Settings) -> Settings:
    """Rotary positions of layers with a window; the older form gives their base alone."""
    given = config.get("rope_parameters")
    if isinstance(given, dict) and given.get("sliding_attention"):
        return rope.parameters({"rope_parameters": given}, "sliding_attention")
    return {"rope_theta": real(config, "rope_local_base_freq", LOCAL)}


def biases(config: Settings) -> Biases:
    return decoder.stated(text(config))


GEMMA3_TEXT = decoder.family("gemma3_text", architecture, norms=NORMS, biases=biases)
GEMMA3 = decoder.family(
    "gemma3",
    architecture,
    norms=NORMS,
    biases=biases,
    prefixes=("model.language_model.", "language_model.model."),
)
