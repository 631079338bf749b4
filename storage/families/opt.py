"""OPT (Zhang et al., arXiv 2205.01068): facebook/opt-*, facebook/galactica-*.

Sequential blocks, learned positions that start at row 2, layer norms before their sub-layers, or
after them in opt-350m, whose embeddings are narrower than the model. Follows transformers'
`modeling_opt.py`; its layer norms have an epsilon of 1e-5 that no config changes.
"""

from __future__ import annotations

import math

from storage import architecture as canonical
from storage.architecture import Architecture, Attention, Ffn, Layer, Norm, NormPlace
from storage.checkpoint import HEAD_SOURCE
from storage.families.family import (
    Family,
    Resident,
    Settings,
    Source,
    activation,
    concatenated,
    copied,
    flag,
    heads,
    layer_count,
    norm,
    number,
    token,
    tokens,
)
from storage.layout import Role

POSITION_OFFSET = 2
NORM_EPSILON = 1e-5


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an activation or a value that is not supported."""
    d_model = number(config, "hidden_size", 768)
    head_count = heads(config, d_model, 12)
    head_dim = d_model // head_count
    before = flag(config, "do_layer_norm_before", True)
    normed = Norm(NORM_EPSILON)
    places: tuple[NormPlace, ...] = (
        ("attention_input", "ffn_input") if before else ("attention_sum", "ffn_sum")
    )
    layer = Layer(
        attention=Attention(head_count, head_count, head_dim, scale=1 / math.sqrt(head_dim)),
        ffn=Ffn(
            "plain",
            units=number(config, "ffn_dim", 3072),
            width=1,
            activation=activation(config, "activation_function", "relu"),
        ),
        norms=dict.fromkeys(places, normed),
    )
    final_norm = before and not flag(config, "_remove_final_layer_norm", False)
    return Architecture(
        family="opt",
        d_model=d_model,
        vocabulary=number(config, "vocab_size", 50272),
        max_positions=number(config, "max_position_embeddings", 2048),
        layers=(layer,) * layer_count(config, 12),
        final_norm=normed if final_norm else None,
        tied_head=flag(config, "tie_word_embeddings", True),
        embed_dim=number(config, "word_embed_proj_dim", d_model),
        learned_positions=POSITION_OFFSET,
        bos_token=token(config, "bos_token_id", 2),
        eos_tokens=tokens(config, "eos_token_id", 2),
    )


def resident(config: Settings, model: Architecture) -> tuple[Resident, ...]:
    affine = flag(config, "layer_norm_elementwise_affine", True)
    bias = flag(config, "enable_bias", True)
    width, narrow = model.d_model, model.embed_dim
    parts = [
        copied(canonical.EMBED, "embed_tokens.weight", model.vocabulary, narrow),
        copied(canonical.POSITIONS, "embed_positions.weight", model.max_positions + POSITION_OFFSET, width),
    ]
    if narrow != width:
        parts.append(copied(canonical.PROJECT_IN, "project_in.weight", width, narrow))
        parts.append(copied(canonical.PROJECT_OUT, "project_out.weight", narrow, width))
    for layer in range(len(model.layers)):
        parts += _layer(model, layer, affine=affine, bias=bias)
    if model.final_norm is not None:
        parts += norm(canonical.FINAL_NORM, "final_layer_norm", width, affine=affine)
    if not model.tied_head:
        parts.append(copied(canonical.HEAD, HEAD_SOURCE, model.vocabulary, narrow))
    return tuple(parts)


def _layer(model: Architecture, layer: int, *, affine: bool, bias: bool) -> list[Resident]:
    def here(part: str) -> str:
        return canonical.layer(layer, part)

    source, width = f"layers.{layer}", model.d_model
    attention = [f"{source}.self_attn.{part}_proj" for part in "qkv"]
    parts = [
        *norm(here("norm"), f"{source}.self_attn_layer_norm", width, affine=affine),
        concatenated(here("qkv.weight"), [Source(f"{name}.weight", (width, width)) for name in attention]),
        copied(here("out.weight"), f"{source}.self_attn.out_proj.weight", width, width),
        *norm(here("ffn_norm"), f"{source}.final_layer_norm", width, affine=affine),
    ]
    if bias:
        parts += [
            concatenated(here("qkv.bias"), [Source(f"{name}.bias", (width,)) for name in attention]),
            copied(here("out.bias"), f"{source}.self_attn.out_proj.bias", width),
            copied(here("up.bias"), f"{source}.fc1.bias", model.layers[layer].ffn.neurons),
            copied(here("down.bias"), f"{source}.fc2.bias", width),
        ]
    return parts


def ffn(model: Architecture, layer: int) -> dict[Role, Source]:
    neurons = model.layers[layer].ffn.neurons
    return {
        "up": Source(f"layers.{layer}.fc1.weight", (neurons, model.d_model)),
        "down": Source(f"layers.{layer}.fc2.weight", (model.d_model, neurons)),
    }


OPT = Family(
    name="opt",
    prefixes=("model.decoder.", "decoder.", ""),
    embedding="embed_tokens.weight",
    architecture=architecture,
    resident=resident,
    ffn=ffn,
)
