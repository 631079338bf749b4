"""SmallThinker (arXiv 2507.20984): many small experts with ReLU gates, chosen before a layer's attention.

The router reads the layer's input as it is, without a norm. Some layers have no rotary positions and see all
tokens, others a window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from storage.architecture import Architecture, Layer, Router
from storage.errors import UnsupportedModel
from storage.families import decoder, experts, rope
from storage.families.family import Settings, flag, layer_count, number

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "num_hidden_layers": 32,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "sliding_window_size": 4096,
    "moe_num_primary_experts": 32,
    "moe_num_active_primary_experts": 4,
    "moe_ffn_hidden_size": 768,
    "tie_word_embeddings": True,
    "bos_token_id": 151_643,
    "eos_token_id": [151_643, 151_645],
}
REFUSED = ("use_qk_norm", "moe_shared_primary_experts", "moe_enable_secondary_experts")


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option or a value that is not supported."""
    config = {**DEFAULTS, **config}
    for key in REFUSED:
        decoder.refuse(config, key)
    if not flag(config, "moe_enable_early_router", True) or not all(_layout(config, "moe_layer_layout", 1)):
        raise UnsupportedModel("config.json: SmallThinker with late routers or dense layers is not supported")
    softmax = flag(config, "moe_primary_router_apply_softmax", False)
    router = Router(
        number(config, "moe_num_active_primary_experts"),
        scores="softmax" if softmax else "sigmoid",
        over="chosen" if softmax else "all",
        renormalise=not softmax,
        reads="layer_input",
    )
    width = number(config, "moe_ffn_hidden_size")
    dense = decoder.gated({"hidden_act": "relu", "intermediate_size": width})
    counted = {"num_local_experts": number(config, "moe_num_primary_experts")}
    ffn, norm = experts.experts(counted, router, width, dense), decoder.rms(config)
    positions = rope.rope(config, rope.parameters(config), decoder.head_dim(config), 1e6)
    plain, window = decoder.attention(config, None), number(config, "sliding_window_size")
    layers = (
        Layer(
            replace(plain, rope=positions if turned else None, window=window if windowed else None),
            ffn,
            dict.fromkeys(decoder.BEFORE, norm),
        )
        for turned, windowed in zip(
            _layout(config, "rope_layout", 1), _layout(config, "sliding_window_layout", 0), strict=True
        )
    )
    return decoder.architecture(config, "smallthinker", layers, norm)


def _layout(config: Settings, key: str, usual: int) -> list[int]:
    """Of each layer 0 or 1."""
    count, found = layer_count(config), config.get(key)
    values: Any = [usual] * count if found is None else found
    if not isinstance(values, list) or len(values) != count or any(one not in (0, 1) for one in values):
        raise UnsupportedModel(f"config.json: {key} must be 0 or 1 for each of {count} layers")
    return values


SMALLTHINKER = decoder.family(
    "smallthinker",
    architecture,
    biases=lambda _: decoder.Biases(),
    experts=experts.Names(block="block_sparse_moe", router="primary_router", roles=("gate", "up", "down")),
)
