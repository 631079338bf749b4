"""MiniCPM (arXiv 2404.06395): Llama with scaled embeddings, branches and logits. MiniCPM-S is sparse."""

from __future__ import annotations

import math
from dataclasses import replace

from storage.architecture import Architecture
from storage.families import decoder, llama
from storage.families.family import Settings, number, real


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    model = llama.architecture({"tie_word_embeddings": True, **config})
    branch = real(config, "scale_depth", 1.0) / math.sqrt(len(model.layers))
    return replace(
        model,
        family="minicpm",
        layers=tuple(replace(layer, branch_scale=branch) for layer in model.layers),
        embedding_scale=real(config, "scale_emb", 1.0),
        logit_scale=number(config, "dim_model_base", 1) / model.d_model,
    )


MINICPM = decoder.family("minicpm", architecture)
