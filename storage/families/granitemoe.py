"""Granite 3 with experts: Granite's scaled block; softmax goes over the chosen experts alone."""

from __future__ import annotations

from dataclasses import replace

from storage.architecture import Architecture, Router
from storage.families import decoder, experts, granite
from storage.families.family import Settings, number

DEFAULTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 2048}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    model = granite.architecture(config)
    router = Router(number(config, "num_experts_per_tok"), over="chosen")
    layers = tuple(
        replace(layer, ffn=experts.experts(config, router, layer.ffn.neurons, layer.ffn))
        for layer in model.layers
    )
    return replace(model, family="granitemoe", layers=layers)


GRANITEMOE = decoder.family(
    "granitemoe",
    architecture,
    experts=experts.Names(
        block="block_sparse_moe",
        router="router.layer",
        stacks=("input_linear.weight", "output_linear.weight"),
    ),
)
