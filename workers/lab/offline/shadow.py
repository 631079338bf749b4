"""The shadow for many tokens at once: what it chooses for each of them, and what the other neurons add."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.ring.plan import Forecast
from storage.architecture import Ffn
from storage.architecture import layer as layer_part
from storage.layout import Role
from storage.manifest import RESIDENT
from storage.shadow import Shadow
from storage.store import Store
from storage.tensors import Tensors
from workers import kernels
from workers.compute.cpu.experts import activated
from workers.compute.cpu.shadow import RESIDENT as RESIDENT_SHARE


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's rows in few bits, widened: [neurons, d_model] each."""

    rows: dict[Role, Tensor]
    lengths: Tensor  # [neurons]


class ShadowScores:
    """Chooses as `compute.cpu.shadow` does, up to float32 rounding; a layer's rows are read when it comes."""

    def __init__(self, store: Store, forecast: Forecast) -> None:
        self._file, self._forecast = Shadow.open(store), forecast
        self._ffns: list[Ffn] = [layer.ffn for layer in store.architecture.layers]
        self._resident = Tensors(store.path / RESIDENT)
        self._last: tuple[int, _Layer] | None = None

    def active(self, layer: int, source: Tensor, own: bool) -> Tensor:
        return self.graded(layer, source, own)[1]

    def graded(self, layer: int, source: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        """What deserves full rows where it is resident, and what does in any case; `[n, neurons]` each."""
        scores = (self._activations(layer, source).abs() * self._layer(layer).lengths).numpy()
        if self._forecast.thresholds:
            threshold = self._forecast.thresholds[layer]
            certain = scores > threshold
            return torch.from_numpy(certain | (scores > RESIDENT_SHARE * threshold)), torch.from_numpy(
                certain
            )
        count = round(self._forecast.full_rows * scores.shape[1])
        certain = np.zeros(scores.shape, np.bool_)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        np.put_along_axis(certain, best, True, axis=1)
        if not count:
            return torch.from_numpy(certain), torch.from_numpy(certain)
        least = np.take_along_axis(scores, best[:, -1:], axis=1)
        return torch.from_numpy(certain | (scores > RESIDENT_SHARE * least)), torch.from_numpy(certain)

    def rest(self, layer: int, ffn_input: Tensor, chosen: Tensor) -> Tensor:
        """What the neurons that are not `chosen` [n, neurons] add, [n, d_model]."""
        others = self._activations(layer, ffn_input) * ~chosen
        return others @ self._layer(layer).rows["down"]

    def _activations(self, layer: int, x: Tensor) -> Tensor:
        """[n, neurons]."""
        ffn = self._ffns[layer]
        up = self._product(layer, "up", x)
        if ffn.kind == "gated":
            return torch.from_numpy(activated(ffn, self._product(layer, "gate", x).numpy(), up.numpy()))
        a = np.ascontiguousarray(up.numpy())
        kernels.activations(a, ffn.activation, *ffn.numbers)
        return torch.from_numpy(a)

    def _product(self, layer: int, role: Role, x: Tensor) -> Tensor:
        product, name = x @ self._layer(layer).rows[role].T, layer_part(layer, f"{role}.bias")
        if name in self._resident:
            product += torch.from_numpy(self._resident.vector(name, (product.shape[1],)))
        return product

    def _layer(self, layer: int) -> _Layer:
        if self._last is None or self._last[0] != layer:
            self._last = layer, self._read(layer)
        return self._last[1]

    def _read(self, layer: int) -> _Layer:
        unit = self._file.unit(layer)
        memory = np.zeros((self._file.units(layer), unit.stride), np.uint8)
        lengths = torch.from_numpy(self._file.read(layer, memory))
        rows = {row.role: torch.from_numpy(unit.view(memory, row.role).widened()) for row in unit.rows}
        if unit.width > 1:  # its down rows are the outputs'
            by_output = rows["down"].view(-1, unit.d_model, unit.width)
            rows["down"] = by_output.transpose(1, 2).reshape(-1, unit.d_model)
        return _Layer(rows, lengths)
