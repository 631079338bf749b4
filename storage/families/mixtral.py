"""Mixtral (arXiv 2401.04088): Mistral's attention, and 8 experts as large as its FFN, 2 a token."""

from __future__ import annotations

from dataclasses import replace

from storage.architecture import Architecture, Router
from storage.families import decoder, experts, mistral
from storage.families.family import Settings, number

DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = {**DEFAULTS, **config}
    model = mistral.architecture(config)
    router = Router(number(config, "num_experts_per_tok"), renormalise=True)
    layers = tuple(
        replace(layer, ffn=experts.experts(config, router, layer.ffn.neurons, layer.ffn))
        for layer in model.layers
    )
    return replace(model, family="mixtral", layers=layers)


# `w1` is the gate, `w3` the up- and `w2` the down-projection.
MIXTRAL = decoder.family(
    "mixtral",
    architecture,
    biases=lambda _: decoder.Biases(),
    experts=experts.Names(block="block_sparse_moe", roles=("w1", "w3", "w2")),
)
