"""Stores of version 1: one architecture and one kind of unit for all layers. FORMAT.md, "Version 1"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from storage.architecture import Activation, Architecture, Attention, Ffn, Layer, Norm, NormPlace, Rope
from storage.codecs import CODECS
from storage.layout import Layout, neuron

ROWS = 2
_PLACES: dict[str, tuple[NormPlace, ...]] = {
    "pre_norm": ("attention_input", "ffn_input"),
    "post_norm": ("attention_sum", "ffn_sum"),
    "parallel": ("attention_input", "ffn_input"),
}


@dataclass(frozen=True, slots=True)
class _Fields:
    """The architecture of version 1, field by field."""

    family: str
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    block: str
    positions: str
    activation: Activation
    shared_norm: bool
    final_norm: bool
    tied_head: bool
    norm_epsilon: float
    embed_dim: int
    position_offset: int
    rotary_base: float
    bos_token: int | None
    eos_tokens: list[int]


def architecture(data: dict[str, Any]) -> Architecture:
    """Raises TypeError, KeyError or ValueError for fields that are missing, unknown or of another type."""
    old = _Fields(**data)
    norm = Norm(old.norm_epsilon)
    places = _PLACES[old.block][: 1 if old.shared_norm else 2]
    layer = Layer(
        attention=Attention(
            heads=old.heads,
            kv_heads=old.kv_heads,
            head_dim=old.head_dim,
            scale=1 / math.sqrt(old.head_dim),
            rope=Rope(old.rotary_base) if old.positions == "rotary" else None,
            alibi=old.positions == "alibi",
        ),
        ffn=Ffn("plain", old.d_ff, 1, old.activation),
        norms=dict.fromkeys(places, norm),
        parallel=old.block == "parallel",
    )
    described = Architecture(
        family=old.family,
        d_model=old.d_model,
        vocabulary=old.vocabulary,
        max_positions=old.max_positions,
        layers=(layer,) * old.layers,
        final_norm=norm if old.final_norm else None,
        tied_head=old.tied_head,
        embed_dim=old.embed_dim,
        learned_positions=old.position_offset if old.positions == "learned" else None,
        bos_token=old.bos_token,
        eos_tokens=tuple(old.eos_tokens),
    )
    return Architecture.from_json(described.to_json())  # checks the types


def layout(data: dict[str, Any], model: Architecture) -> Layout:
    """Raises KeyError, TypeError or ValueError for what version 1 does not allow."""
    dtype, alignment = data["dtype"], data["alignment"]
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r} bytes")
    if dtype not in CODECS or data["rows"] != ROWS:
        raise ValueError(f"{data['rows']} rows of {dtype}")
    unit = neuron(dtype, model.d_model, alignment)
    if unit.stride != data["stride"]:
        raise ValueError(f"bundles of {data['stride']} bytes where their rows take {unit.stride}")
    return Layout.of((layer.ffn.units, unit) for layer in model.layers)
