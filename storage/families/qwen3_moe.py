"""Qwen 3 with experts (arXiv 2505.09388): Qwen 3's attention, and 128 small experts, 8 a token."""

from __future__ import annotations

from dataclasses import replace

from storage.architecture import Architecture, Router
from storage.families import decoder, experts, qwen3
from storage.families.family import Settings, flag, number

DEFAULTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, "head_dim": None, **config}  # which this class, unlike Qwen 3's, does not name
    model = qwen3.architecture(config)
    router = Router(number(config, "num_experts_per_tok"), renormalise=flag(config, "norm_topk_prob", False))
    width = number(config, "moe_intermediate_size")
    layers = tuple(
        replace(
            layer,
            ffn=experts.experts(config, router, width, layer.ffn) if sparse else experts.dense(layer.ffn),
        )
        for layer, sparse in zip(model.layers, experts.sparse_layers(config), strict=True)
    )
    return replace(model, family="qwen3_moe", layers=layers)


QWEN3_MOE = decoder.family("qwen3_moe", architecture, experts=experts.Names())
