"""A model's resident weights in a device's memory, each where it is used.

Matrices stay in their codec and are widened when they are used, a tile at a time. On the CPU they are the
arrays that were given; elsewhere one after the other is read and copied over, and the host keeps vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.ring.plan import WIDENED
from storage.architecture import EMBED, POSITIONS, Norm, NormPlace
from storage.codecs import F32, Codec
from workers.compute import bound
from workers.compute.bound import BoundLayer, BoundModel, BoundNorm, Source
from workers.compute.torch.widening import stored, widened


@dataclass(frozen=True, slots=True)
class Matrix:
    """weight @ x + bias."""

    weight: Tensor  # as stored: [out, in] in floats, [out, bytes] in few bits
    codec: Codec
    width: int
    bias: Tensor | None = None  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out] from [rows, in], float32. The result does not depend on how memory is divided."""
        lines = self.weight.shape[0]
        step = lines if self.weight.dtype == torch.float32 else max(1, WIDENED // (4 * self.width))
        parts = [
            functional.linear(x, widened(self.weight[start : start + step], self.codec))
            for start in range(0, lines, step)
        ]
        product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return product if self.bias is None else product + self.bias

    def lines(self, which: Tensor | slice) -> Tensor:
        """Some lines, widened."""
        return widened(self.weight[which], self.codec)


@dataclass(frozen=True, slots=True)
class PlacedNorm:
    """A norm with its tensors."""

    norm: Norm
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm.kind == "rms":
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm.epsilon)
            return x * scale * (self.weight + self.norm.offset)
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.norm.epsilon)


@dataclass(frozen=True, slots=True)
class PlacedShared:
    """What of an FFN every token has."""

    gate: Matrix
    up: Matrix
    down: Matrix
    switch: Matrix | None


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """One layer's resident weights; vectors may be empty."""

    norms: dict[NormPlace, PlacedNorm]
    qkv: Matrix
    out: Matrix
    up_bias: Tensor
    down_bias: Tensor
    gate_bias: Tensor
    sinks: Tensor
    q_norm: PlacedNorm | None = None
    k_norm: PlacedNorm | None = None
    router: bound.Linear | None = None  # the host's: experts are chosen by the predictor's kernel
    shared: PlacedShared | None = None


class Placed:
    """All of a model's resident weights on a device."""

    def __init__(self, source: Source, where: torch.device) -> None:
        """Raises KeyError for a tensor that is not there."""
        self._source, self.where = source, where
        self._matrices: dict[str, Tensor] = {}
        model = BoundModel.of(source)
        self.layers = [self._layer(layer) for layer in model.layers]
        self.project_in = None if model.project_in is None else self.matrix(model.project_in)
        self.project_out = None if model.project_out is None else self.matrix(model.project_out)
        self.final_norm = None if model.final_norm is None else self._norm(model.final_norm)
        self.head = self.matrix(model.head)
        self.embed = self._table(EMBED)
        learned = source.architecture.learned_positions is not None
        self.positions = self._table(POSITIONS) if learned else None

    def matrix(self, linear: bound.Linear) -> Matrix:
        """The same tensor under one name is there once."""
        if linear.name not in self._matrices:
            self._matrices[linear.name] = stored(self._source.read(linear.name), self.where)
        bias = self.vector(linear.bias) if linear.bias.size else None
        return Matrix(self._matrices[linear.name], linear.weight.codec, linear.weight.width, bias)

    def vector(self, array: F32) -> Tensor:
        return torch.from_numpy(array).to(self.where)

    def _table(self, name: str) -> Matrix:
        nothing = self._source.vector("")
        return self.matrix(bound.Linear(name, self._source.matrix(name), nothing))

    def _norm(self, norm: BoundNorm) -> PlacedNorm:
        return PlacedNorm(norm.norm, self.vector(norm.weight), self.vector(norm.bias))

    def _layer(self, layer: BoundLayer) -> PlacedLayer:
        shared, router = layer.shared, layer.router
        if router is not None:
            router = bound.Linear(router.name, self._source.read(router.name), router.bias)
        return PlacedLayer(
            norms={place: self._norm(norm) for place, norm in layer.norms.items()},
            qkv=self.matrix(layer.qkv),
            out=self.matrix(layer.out),
            up_bias=self.vector(layer.up_bias),
            down_bias=self.vector(layer.down_bias),
            gate_bias=self.vector(layer.gate_bias),
            sinks=self.vector(layer.sinks),
            q_norm=None if layer.q_norm is None else self._norm(layer.q_norm),
            k_norm=None if layer.k_norm is None else self._norm(layer.k_norm),
            router=router,
            shared=None
            if shared is None
            else PlacedShared(
                self.matrix(shared.gate),
                self.matrix(shared.up),
                self.matrix(shared.down),
                None if shared.switch is None else self.matrix(shared.switch),
            ),
        )
