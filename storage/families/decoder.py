"""What gated decoders have in common: Llama's block, which each family's file varies.

`x += out(attention(norm(x)))`, then `x += down(activation(gate · h) * (up · h))` with `h = norm(x)`. Norms
are root mean square, positions rotary, key-value heads shared by groups of query heads.

Read `llama.py` beside this file. A family gives its class's defaults, for keys that a `config.json` lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from storage import architecture as canonical
from storage.architecture import (
    Activation,
    Architecture,
    Attention,
    Ffn,
    Layer,
    Norm,
    NormPlace,
    QkNorm,
    Rope,
)
from storage.checkpoint import HEAD_SOURCE
from storage.errors import UnsupportedModel
from storage.families import experts as mixture
from storage.families.experts import Names
from storage.families.family import (
    ACTIVATIONS,
    Family,
    Resident,
    Settings,
    Source,
    activation,
    concatenated,
    copied,
    flag,
    layer_count,
    number,
    real,
    token,
    tokens,
)
from storage.layout import Role

GATED: dict[str, Activation] = {**ACTIVATIONS, "silu": "silu", "swish": "silu", "fatrelu": "fatrelu"}
BEFORE: dict[NormPlace, str] = {  # where Llama has its norms
    "attention_input": "input_layernorm",
    "ffn_input": "post_attention_layernorm",
}


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections have one."""

    qkv: bool = False
    out: bool = False
    ffn: bool = False


def stated(config: Settings) -> Biases:
    """As Llama's config states them."""
    attention = flag(config, "attention_bias", False)
    return Biases(attention, attention, flag(config, "mlp_bias", False))


def head_dim(config: Settings) -> int:
    """Of queries, keys and values: its own, or the model's width divided among the heads."""
    width, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if config.get("head_dim") is None and width % heads:
        raise UnsupportedModel(f"config.json: hidden_size {width} is not divisible by {heads} heads")
    return number(config, "head_dim", width // heads)


def attention(
    config: Settings,
    rope: Rope | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    qk_norm: QkNorm | None = None,
) -> Attention:
    """Scaled by the root of the head's width unless told otherwise."""
    heads = number(config, "num_attention_heads")
    kv_heads = number(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UnsupportedModel(
            f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"
        )
    width = head_dim(config)
    usual = 1 / math.sqrt(width)
    return Attention(
        heads, kv_heads, width, usual if scale is None else scale, rope, False, window, softcap, qk_norm
    )


def gated(config: Settings, key: str = "hidden_act", default: str = "silu") -> Ffn:
    """Raises UnsupportedModel for an activation that is not supported."""
    function = activation(config, key, default, GATED)
    threshold = real(config, f"{key}_param") if function == "fatrelu" else 0.0
    return Ffn("gated", number(config, "intermediate_size"), 1, function, threshold)


def rms(config: Settings, offset: Any = 0) -> Norm:
    return Norm(real(config, "rms_norm_eps", 1e-6), "rms", offset)


def sliding(config: Settings, usual: Callable[[int], bool]) -> list[bool]:
    """Which layers have a window: as `layer_types` says, or as is `usual`."""
    count, kinds = layer_count(config), config.get("layer_types")
    if kinds is None:
        return [usual(index) for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise UnsupportedModel(f"config.json: layer_types must name {count} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"layers of type {kind!r} are not supported; supported are full_attention, sliding_attention"
            )
    return [kind == "sliding_attention" for kind in kinds]


def optional(config: Settings, key: str) -> float | None:
    """A positive number, or null."""
    return None if config.get(key) is None else real(config, key)


def refuse(config: Settings, key: str) -> None:
    """Raises UnsupportedModel for an option that is on."""
    if config.get(key):
        raise UnsupportedModel(f"config.json: {key} {config[key]!r} is not supported")


def architecture(
    config: Settings, family: str, layers: Iterable[Layer], norm: Norm, **scales: Any
) -> Architecture:
    """`scales` are the architecture's own of that name."""
    width = number(config, "hidden_size")
    return Architecture(
        family=family,
        d_model=width,
        vocabulary=number(config, "vocab_size"),
        max_positions=number(config, "max_position_embeddings"),
        layers=tuple(layers),
        final_norm=norm,
        tied_head=flag(config, "tie_word_embeddings", False),
        embed_dim=width,
        learned_positions=None,
        bos_token=token(config, "bos_token_id", None),
        eos_tokens=tokens(config, "eos_token_id", None),
        **scales,
    )


def family(
    name: str,
    described: Callable[[Settings], Architecture],
    *,
    biases: Callable[[Settings], Biases] = stated,
    norms: Mapping[NormPlace, str] = BEFORE,
    fused: bool = False,
    experts: Names | None = None,
    prefixes: tuple[str, ...] = ("model.", ""),
) -> Family:
    """`fused`: queries, keys and values are one tensor, and so are gate and up. `experts`: of a mixture."""
    return Family(
        name=name,
        prefixes=prefixes,
        embedding="embed_tokens.weight",
        architecture=described,
        resident=lambda config, model: _resident(model, biases(config), norms, fused, experts),
        ffn=partial(_ffn, fused=fused),
        experts=None if experts is None else partial(mixture.sources, experts),
    )


def _resident(
    model: Architecture,
    biases: Biases,
    norms: Mapping[NormPlace, str],
    fused: bool,
    experts: Names | None,
) -> tuple[Resident, ...]:
    width = model.d_model
    parts = [copied(canonical.EMBED, "embed_tokens.weight", model.vocabulary, width)]
    for index, layer in enumerate(model.layers):
        parts += _attention(layer.attention, index, width, biases, fused)
        for place in layer.norms:
            name = f"{canonical.NORM_PARTS[place]}.weight"
            parts.append(copied(canonical.layer(index, name), f"layers.{index}.{norms[place]}.weight", width))
        if experts is not None:
            parts += mixture.resident(experts, model, index)
        if biases.ffn:
            sizes = {"gate": layer.ffn.neurons, "up": layer.ffn.neurons, "down": width}
            for role, size in sizes.items():
                source = f"layers.{index}.mlp.{role}_proj.bias"
                parts.append(copied(canonical.layer(index, f"{role}.bias"), source, size))
    parts.append(copied(f"{canonical.FINAL_NORM}.weight", "norm.weight", width))
    if not model.tied_head:
        parts.append(copied(canonical.HEAD, HEAD_SOURCE, model.vocabulary, width))
    return tuple(parts)


def _attention(a: Attention, index: int, width: int, biases: Biases, fused: bool) -> list[Resident]:
    def here(part: str) -> str:
        return canonical.layer(index, part)

    source = f"layers.{index}.self_attn"
    sizes = {"q": a.width, "k": a.kv_heads * a.head_dim, "v": a.kv_heads * a.head_dim}
    if fused:
        parts = [copied(here("qkv.weight"), f"{source}.qkv_proj.weight", a.projected, width)]
    else:
        weights = [Source(f"{source}.{one}_proj.weight", (size, width)) for one, size in sizes.items()]
        parts = [concatenated(here("qkv.weight"), weights)]
    parts.append(copied(here("out.weight"), f"{source}.o_proj.weight", width, a.width))
    if biases.qkv:
        vectors = [Source(f"{source}.{one}_proj.bias", (size,)) for one, size in sizes.items()]
        parts.append(concatenated(here("qkv.bias"), vectors))
    if biases.out:
        parts.append(copied(here("out.bias"), f"{source}.o_proj.bias", width))
    if a.sinks:
        parts.append(copied(here("sinks"), f"{source}.sinks", a.heads))
    if a.qk_norm is not None:
        for one in ("q", "k"):
            size = a.head_dim if a.qk_norm.over == "head" else sizes[one]
            parts.append(copied(here(f"{one}_norm.weight"), f"{source}.{one}_norm.weight", size))
    return parts


def _ffn(model: Architecture, index: int, fused: bool) -> dict[Role, Source]:
    source, neurons, width = f"layers.{index}.mlp", model.layers[index].ffn.neurons, model.d_model
    gate = Source(f"{source}.gate_proj.weight", (neurons, width))
    up = Source(f"{source}.up_proj.weight", (neurons, width))
    if fused:
        gate, up = (
            Source(f"{source}.gate_up_proj.weight", (neurons, width), start, 2 * neurons)
            for start in (0, neurons)
        )
    return {"gate": gate, "up": up, "down": Source(f"{source}.down_proj.weight", (width, neurons))}
