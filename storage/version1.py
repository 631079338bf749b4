"""Stores of version 1: one architecture and one kind of unit for all layers. FORMAT.md, "Version 1"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from storage.architecture import Activation, Architecture, Attention, Ffn, Layer, Norm, NormPlace, Rope
from storage.codecs import FLOATS
from storage.layout import Layout, check_alignment, neuron
from storage.records import read_record

ROWS = 2
_MOST = 1 << 16  # layers, and values of a head: the file is not trusted yet
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
    block: Literal["pre_norm", "post_norm", "parallel"]
    positions: Literal["learned", "rotary", "alibi"]
    activation: Activation
    shared_norm: bool
    final_norm: bool
    tied_head: bool
    norm_epsilon: float
    embed_dim: int
    position_offset: int
    rotary_base: float
    bos_token: int | None
    eos_tokens: tuple[int, ...]


def architecture(data: dict[str, Any]) -> Architecture:
    """Raises ValueError for fields that are missing, unknown, of another type or without sense."""
    old = read_record(_Fields, data)
    if not all(0 < number <= _MOST for number in (old.layers, old.head_dim)):
        raise ValueError(f"{old.layers!r:.20} layers with heads of {old.head_dim!r:.20}")
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
    return Architecture(
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
        eos_tokens=old.eos_tokens,
    )


def layout(data: dict[str, Any], model: Architecture) -> Layout:
    """Raises KeyError, TypeError or ValueError for what version 1 does not allow."""
    dtype, alignment = data["dtype"], data["alignment"]
    check_alignment(alignment)
    if dtype not in FLOATS or data["rows"] != ROWS:
        raise ValueError(f"{data['rows']} rows of {dtype}")
    unit = neuron(dtype, model.d_model, alignment)
    if unit.stride != data["stride"]:
        raise ValueError(f"bundles of {data['stride']} bytes where their rows take {unit.stride}")
    return Layout.of((layer.ffn.units, unit) for layer in model.layers)
