"""Qwen 1.5 and 2 with experts: Qwen 2's attention, small experts, and a large one that every token has."""

from __future__ import annotations

from dataclasses import replace

from storage.architecture import Architecture, Router, Shared
from storage.families import decoder, experts, qwen2
from storage.families.family import Settings, flag, number

DEFAULTS = {
    **qwen2.DEFAULTS,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    model = qwen2.described(config, "qwen2_moe", None)
    router = Router(number(config, "num_experts_per_tok"), renormalise=flag(config, "norm_topk_prob", False))
    width = number(config, "moe_intermediate_size")
    shared = Shared(number(config, "shared_expert_intermediate_size"), gated=True)
    layers = tuple(
        replace(
            layer,
            ffn=experts.experts(config, router, width, layer.ffn, shared)
            if sparse
            else experts.dense(layer.ffn),
        )
        for layer, sparse in zip(model.layers, experts.sparse_layers(config), strict=True)
    )
    return replace(model, layers=layers)


QWEN2_MOE = decoder.family(
    "qwen2_moe",
    architecture,
    biases=lambda config: decoder.Biases(qkv=flag(config, "qkv_bias", True)),
    experts=experts.Names(),
)
