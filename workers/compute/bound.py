"""Every weight of a model where it is used, looked up once: by layer and place instead of by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from storage.architecture import (
    EMBED,
    FINAL_NORM,
    HEAD,
    NORM_PARTS,
    PROJECT_IN,
    PROJECT_OUT,
    Architecture,
    Norm,
    NormPlace,
    layer,
)
from storage.codecs import F32
from storage.layout import ROLES, Layout, Rows


class Source(Protocol):
    """Where weights come from: `weights.Weights`, or what streams them."""

    architecture: Architecture
    layout: Layout

    def matrix(self, name: str) -> Rows: ...
    def read(self, name: str) -> Rows: ...
    def has(self, name: str) -> bool: ...
    def vector(self, name: str) -> F32: ...
    def lines(self, name: str, which: Any) -> F32: ...


@dataclass(frozen=True, slots=True)
class Linear:
    """weight @ x + bias; the bias may be empty."""

    name: str
    weight: Rows  # [out, in]
    bias: F32  # [out]


@dataclass(frozen=True, slots=True)
class BoundNorm:
    """A norm with its tensors, as wide as what it is applied to; the bias may be empty."""

    norm: Norm
    weight: F32
    bias: F32


@dataclass(frozen=True, slots=True)
class BoundShared:
    """What of an FFN every token has; `switch` is of one output, whose sigmoid is this part's weight."""

    gate: Linear
    up: Linear
    down: Linear
    switch: Linear | None


@dataclass(frozen=True, slots=True)
class BoundLayer:
    """One layer's resident weights. Biases of the FFN may be empty."""

    norms: dict[NormPlace, BoundNorm]
    qkv: Linear
    out: Linear
    up_bias: F32  # [neurons]
    down_bias: F32  # [d_model]; of experts [units · d_model]
    gate_bias: F32 = field(default_factory=lambda: np.zeros(0, np.float32))  # [neurons]
    sinks: F32 = field(default_factory=lambda: np.zeros(0, np.float32))  # [heads], or empty
    q_norm: BoundNorm | None = None
    k_norm: BoundNorm | None = None
    router: Linear | None = None
    shared: BoundShared | None = None


@dataclass(frozen=True, slots=True)
class BoundModel:
    """All of a model's resident weights but the tables that tokens and positions are looked up in."""

    layers: tuple[BoundLayer, ...]
    project_in: Linear | None
    project_out: Linear | None
    final_norm: BoundNorm | None
    head: Linear

    @classmethod
    def of(cls, source: Source) -> BoundModel:
        """Raises KeyError for a tensor that is not there."""
        model = source.architecture
        return cls(
            layers=tuple(_layer(source, index) for index in range(len(model.layers))),
            project_in=_linear(source, "project_in") if source.has(PROJECT_IN) else None,
            project_out=_linear(source, "project_out") if source.has(PROJECT_OUT) else None,
            final_norm=_norm(source, FINAL_NORM, model.final_norm) if model.final_norm else None,
            head=_named(source, EMBED if model.tied_head else HEAD, ""),
        )


def _layer(source: Source, index: int) -> BoundLayer:
    described = source.architecture.layers[index]
    norms, qk_norm = described.norms, described.attention.qk_norm
    q_norm, k_norm = (
        None if qk_norm is None else _norm(source, layer(index, f"{one}_norm"), qk_norm.norm) for one in "qk"
    )
    return BoundLayer(
        norms={place: _norm(source, layer(index, NORM_PARTS[place]), norm) for place, norm in norms.items()},
        qkv=_linear(source, layer(index, "qkv")),
        out=_linear(source, layer(index, "out")),
        up_bias=source.vector(layer(index, "up.bias")),
        down_bias=source.vector(layer(index, "down.bias")),
        gate_bias=source.vector(layer(index, "gate.bias")),
        sinks=source.vector(layer(index, "sinks")),
        q_norm=q_norm,
        k_norm=k_norm,
        router=None if described.ffn.router is None else _linear(source, layer(index, "router")),
        shared=_shared(source, index),
    )


def _shared(source: Source, index: int) -> BoundShared | None:
    shared = source.architecture.layers[index].ffn.shared
    if shared is None:
        return None
    gate, up, down = (_linear(source, layer(index, f"shared_{role}")) for role in ROLES["gated"])
    switch = _linear(source, layer(index, "shared_switch")) if shared.gated else None
    return BoundShared(gate, up, down, switch)


def _norm(source: Source, name: str, norm: Norm) -> BoundNorm:
    return BoundNorm(norm, source.vector(f"{name}.weight"), source.vector(f"{name}.bias"))


def _linear(source: Source, name: str) -> Linear:
    return _named(source, f"{name}.weight", f"{name}.bias")


def _named(source: Source, weight: str, bias: str) -> Linear:
    return Linear(weight, source.matrix(weight), source.vector(bias))
