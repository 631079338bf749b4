"""Falcon (Almazrouei et al., arXiv 2311.16867): tiiuae/falcon-*, falcon-rw-*, falcon-11B.

Three decoders under one `model_type`, told apart by flags as in transformers'
`modeling_falcon.py`:

- new decoder (40b, 180b, 11b): parallel, grouped key-value heads, two norms or one;
- parallel, multi-query, one norm (7b);
- sequential (rw), usually with ALiBi, biases and a key-value head per query head.

Configurations of 2023 call the model RefinedWeb, and several settings otherwise (`as_today`).

The fused `query_key_value` has a row layout of its own in each: groups of queries with their key
and value (new decoder), all queries and one key and value (multi-query), or query, key and value of
each head in turn. The store holds all queries, then all keys, then all values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from storage import architecture as canonical
from storage.architecture import Architecture, Attention, Ffn, Layer, Norm, NormPlace, Rope
from storage.checkpoint import HEAD_SOURCE
from storage.codecs import Carrier
from storage.errors import UnsupportedModel
from storage.families.family import (
    Family,
    Resident,
    Settings,
    Source,
    activation,
    copied,
    flag,
    heads,
    layer_count,
    norm,
    number,
    real,
    token,
    tokens,
)
from storage.layout import Role

# What the model types and settings of 2023 are called today.
OLD_KINDS = ("RefinedWebModel", "RefinedWeb")
OLD_NAMES = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}


def as_today(config: Settings) -> Settings:
    """A configuration of 2023 with today's names; falcon-40b's had groups of heads without saying so."""
    if config.get("model_type") not in OLD_KINDS:
        return config
    grouped = {"new_decoder_architecture": True} if config.get("n_head_kv") else {}
    return {**grouped, **{OLD_NAMES.get(key, key): value for key, value in config.items()}}


def architecture(config: Settings) -> Architecture:
    """Raises UnsupportedModel for an option, an activation or a value that is not supported."""
    config = as_today(config)
    d_model = number(config, "hidden_size", 4544)
    head_count = heads(config, d_model, 71)
    head_dim = d_model // head_count
    alibi = flag(config, "alibi", False)
    parallel = _parallel(config)
    one_norm = parallel and _parallel_norms(config) == 1
    places: tuple[NormPlace, ...] = ("attention_input",) if one_norm else ("attention_input", "ffn_input")
    normed = Norm(real(config, "layer_norm_epsilon", 1e-5))
    layer = Layer(
        attention=Attention(
            heads=head_count,
            kv_heads=_kv_heads(config, head_count),
            head_dim=head_dim,
            scale=1 / math.sqrt(head_dim),
            rope=None if alibi else Rope(_rotary_base(config)),
            alibi=alibi,
        ),
        ffn=Ffn(
            "plain",
            units=number(config, "ffn_hidden_size", 4 * d_model),
            width=1,
            activation=activation(config, "activation", "gelu"),
        ),
        norms=dict.fromkeys(places, normed),
        parallel=parallel,
    )
    return Architecture(
        family="falcon",
        d_model=d_model,
        vocabulary=number(config, "vocab_size", 65024),
        max_positions=number(config, "max_position_embeddings", 2048),
        layers=(layer,) * layer_count(config, 32),
        final_norm=normed,
        tied_head=flag(config, "tie_word_embeddings", True),
        embed_dim=d_model,
        learned_positions=None,
        bos_token=token(config, "bos_token_id", 11),
        eos_tokens=tokens(config, "eos_token_id", 11),
    )


def _new_decoder(config: Settings) -> bool:
    return flag(config, "new_decoder_architecture", False)


def _parallel(config: Settings) -> bool:
    parallel = flag(config, "parallel_attn", True)
    if _new_decoder(config) and not parallel:
        raise UnsupportedModel(
            "Falcon's new_decoder_architecture with parallel_attn false is not supported; "
            "supported is new_decoder_architecture with parallel_attn true"
        )
    return parallel


def _parallel_norms(config: Settings) -> int:
    """Norms of a parallel block: 1 (shared) or 2."""
    default = 2 if _new_decoder(config) else 1
    count = number(config, "num_ln_in_parallel_attn", default)
    if count > default:
        raise UnsupportedModel(
            f"Falcon with num_ln_in_parallel_attn {count} is not supported; supported are 1, and 2 with "
            "new_decoder_architecture"
        )
    return count


def _kv_heads(config: Settings, head_count: int) -> int:
    if not _new_decoder(config) and flag(config, "multi_query", True):
        return 1  # whatever num_kv_heads says: falcon-7b's says 71
    kv_heads = number(config, "num_kv_heads", head_count)
    if head_count % kv_heads:
        raise UnsupportedModel(
            f"config.json: num_kv_heads {kv_heads} does not divide num_attention_heads {head_count}"
        )
    if not _new_decoder(config) and kv_heads != head_count:
        raise UnsupportedModel(
            f"Falcon with num_kv_heads {kv_heads} of {head_count} heads is not supported without "
            "new_decoder_architecture; supported are multi_query, or a key-value head per head"
        )
    return kv_heads


def _rotary_base(config: Settings) -> float:
    """`rope_theta`, at the top or in `rope_parameters`, where transformers 5 keeps it."""
    base = real(config, "rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope: Any = config.get(key)
        if not rope:
            continue
        if not isinstance(rope, dict):
            raise UnsupportedModel(f"config.json: {key} must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UnsupportedModel(
                f"rotary positions of type {kind!r} are not supported; supported is default"
            )
        base = real(rope, "rope_theta", base)
    return base


def resident(config: Settings, model: Architecture) -> tuple[Resident, ...]:
    parts = [copied(canonical.EMBED, "word_embeddings.weight", model.vocabulary, model.d_model)]
    for layer in range(len(model.layers)):
        parts += _layer(config, model, layer)
    parts += norm(canonical.FINAL_NORM, "ln_f", model.d_model)
    if not model.tied_head:
        parts.append(copied(canonical.HEAD, HEAD_SOURCE, model.vocabulary, model.d_model))
    return tuple(parts)


def _layer(config: Settings, model: Architecture, layer: int) -> list[Resident]:
    def here(part: str) -> str:
        return canonical.layer(layer, part)

    source, width = f"h.{layer}", model.d_model
    attention, neurons = model.layers[layer].attention, model.layers[layer].ffn.neurons
    parts = [
        *_norms(model, layer),
        _qkv(attention, here("qkv.weight"), f"{source}.self_attention.query_key_value.weight", width),
        copied(here("out.weight"), f"{source}.self_attention.dense.weight", width, width),
    ]
    if flag(config, "bias", False):
        parts += [
            _qkv(attention, here("qkv.bias"), f"{source}.self_attention.query_key_value.bias"),
            copied(here("out.bias"), f"{source}.self_attention.dense.bias", width),
            copied(here("up.bias"), f"{source}.mlp.dense_h_to_4h.bias", neurons),
            copied(here("down.bias"), f"{source}.mlp.dense_4h_to_h.bias", width),
        ]
    return parts


def _norms(model: Architecture, layer: int) -> list[Resident]:
    first, second = "input_layernorm", "post_attention_layernorm"
    own = "ffn_input" in model.layers[layer].norms  # the FFN's, where it does not share attention's
    if model.layers[layer].parallel and own:
        first, second = "ln_attn", "ln_mlp"
    parts = [*norm(canonical.layer(layer, "norm"), f"h.{layer}.{first}", model.d_model)]
    if own:
        parts += norm(canonical.layer(layer, "ffn_norm"), f"h.{layer}.{second}", model.d_model)
    return parts


def _qkv(attention: Attention, name: str, source: str, *columns: int) -> Resident:
    shape = (attention.projected, *columns)
    return Resident(name, shape, (Source(source, shape),), partial(_queries_first, attention))


def _queries_first(attention: Attention, sources: Sequence[Carrier]) -> Carrier:
    """Rows in groups of (queries of a key-value head, its key, its value) -> queries, keys, values.

    One group is multi-query's layout, a group per head the interleaved one of falcon-rw.
    """
    (fused,) = sources
    queries = attention.heads // attention.kv_heads
    groups = fused.reshape(attention.kv_heads, queries + 2, attention.head_dim, *fused.shape[1:])
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, *fused.shape[1:]) for part in parts])


def ffn(model: Architecture, layer: int) -> dict[Role, Source]:
    neurons = model.layers[layer].ffn.neurons
    return {
        "up": Source(f"h.{layer}.mlp.dense_h_to_4h.weight", (neurons, model.d_model)),
        "down": Source(f"h.{layer}.mlp.dense_4h_to_h.weight", (model.d_model, neurons)),
    }


FALCON = Family(
    name="falcon",
    prefixes=("transformer.", ""),
    embedding="word_embeddings.weight",
    architecture=architecture,
    resident=resident,
    ffn=ffn,
)
