"""One layer's FFN in float32: its true rows, low-bit copies of them, and a variant's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from storage.architecture import Ffn
from storage.layout import Role, Unit
from storage.shadow import Shadow, path_of
from storage.store import Store
from workers.compute.bound import BoundLayer
from workers.compute.torch.ffn import activated, gated
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.variant import Scored, Variant

Known: TypeAlias = dict[tuple[int, int], Tensor]  # activations by the ids of rows and input


@dataclass(frozen=True, slots=True)
class FfnRows:
    """A layer's matrices by neuron, [neurons, d_model] each; `gate` in gated FFNs only."""

    gate: Tensor | None
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a layer's activations can be made from, [n, d_model] each."""

    own: Tensor
    early: Tensor
    previous: Tensor

    def some(self, rows: slice | Tensor) -> Inputs:
        return Inputs(self.own[rows], self.early[rows], self.previous[rows])

    def every(self, step: int) -> Inputs:
        """One row of so many."""
        return self.some(slice(None, None, step))

    def of(self, scored: Scored) -> Tensor:
        return self.own if scored == "true" else getattr(self, scored)


@dataclass(frozen=True, slots=True)
class LayerFfn:
    """One layer's FFN, ready to be computed in any variant."""

    ffn: Ffn
    rows: FfnRows
    copies: Mapping[str, FfnRows]
    gate_bias: Tensor  # [neurons], or empty
    up_bias: Tensor
    down_bias: Tensor  # [d_model], or empty
    norm: Tensor  # [neurons]: lengths of the true down rows

    @classmethod
    def load(cls, store: Store, index: int, bound: BoundLayer, names: Iterable[str]) -> LayerFfn:
        """Of the store's rows, with copies in these formats."""
        ffn, rows = store.architecture.layers[index].ffn, _true(store, index)
        shadow = _shadow(store)
        copies = {
            name: _shadowed(shadow, index)
            if shadow is not None and shadow.codec == name
            else _copy(ffn, rows, Copy.of(name))
            for name in names
        }
        gate, up, down = (torch.from_numpy(one) for one in (bound.gate_bias, bound.up_bias, bound.down_bias))
        return cls(ffn, rows, copies, gate, up, down, norm=rows.down.norm(dim=1))

    def activations(self, rows: FfnRows, x: Tensor) -> Tensor:
        """Of every neuron, [n, neurons]."""
        up = functional.linear(x, rows.up, self.up_bias if self.up_bias.numel() else None)
        if rows.gate is None:
            return activated(self.ffn, up)
        gate = functional.linear(x, rows.gate, self.gate_bias if self.gate_bias.numel() else None)
        return gated(self.ffn, gate, up)

    def scores(self, a: Tensor, centre: Tensor | None) -> Tensor:
        """How much each neuron's true rows matter, of activations [n, neurons]."""
        return (a if centre is None else a - centre).abs() * self.norm

    def output(
        self,
        variant: Variant,
        index: int,
        inputs: Inputs,
        centre: Tensor,
        whole: Tensor,
        known: Known | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The FFN's output [n, d_model] and the chosen neurons [n, neurons] bool.

        Rows of `whole` [n] bool have all their neurons, in true rows. `known` keeps activations for further
        calls with the same inputs.
        """
        several, known = known is not None, {} if known is None else known
        a = self._lazily(self.rows, inputs.own, known)
        low = self._lazily(self.copies[variant.copy], inputs.own, known) if variant.copy else a
        if variant.scored == "true":
            scored = a
        elif variant.scored == "own":
            scored = low
        else:
            assert variant.copy is not None
            scored = self._lazily(self.copies[variant.copy], inputs.of(variant.scored), known)
        chosen = self._choose(variant, index, scored, centre, len(whole))
        chosen[whole] = True
        output = torch.zeros_like(inputs.own)
        if self.down_bias.numel():
            output += self.down_bias
        if variant.others == "mean":
            values = a() if variant.reads == "all" else torch.where(whole[:, None], a(), low())
            return torch.addmm(output, torch.where(chosen, values, centre), self.rows.down), chosen
        if variant.others == "low" and not chosen.all():
            assert variant.copy is not None
            output = torch.addmm(output, low() * ~chosen, self.copies[variant.copy].down)
        some = chosen.any(dim=1).nonzero()[:, 0]  # where no neuron is chosen no true rows are needed
        if len(some) == len(chosen) or several or (variant.scored == "true" and variant.share != 0):
            values = a()[some]
        else:
            values = self.activations(self.rows, inputs.own[some])
        if variant.reads == "down":
            values = torch.where(whole[some, None], values, low()[some])
        output[some] = torch.addmm(output[some], values * chosen[some], self.rows.down)
        return output, chosen

    def _lazily(self, rows: FfnRows, x: Tensor, known: Known) -> Callable[[], Tensor]:
        """Activations that are computed once, when they are first asked for."""

        def get() -> Tensor:
            key = id(rows), id(x)
            if key not in known:
                known[key] = self.activations(rows, x)
            return known[key]

        return get

    def _choose(
        self, variant: Variant, index: int, scored: Callable[[], Tensor], centre: Tensor, count: int
    ) -> Tensor:
        """The variant's neurons of `count` rows, [count, neurons] bool."""
        if variant.share in (0.0, 1.0):  # without scores
            return torch.full((count, self.norm.numel()), variant.share == 1.0)
        scores = self.scores(scored(), centre if variant.centred else None)
        if variant.thresholds is not None:
            return scores > variant.thresholds[index]
        assert variant.share is not None
        return best(scores, variant.share)


def best(scores: Tensor, share: float) -> Tensor:
    """The best `share` of each row's scores [n, neurons], as bools; at least one."""
    count = max(1, round(share * scores.shape[1]))
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True)


def _true(store: Store, index: int) -> FfnRows:
    return _widened(store.read_layer(index), store.layout.layers[index].unit)


def _widened(units: npt.NDArray[np.uint8], unit: Unit) -> FfnRows:
    """Of units [units, stride] as they lie."""

    def rows(role: Role) -> Tensor:
        found = torch.from_numpy(unit.view(units, role).widened())
        if role == "down" and unit.width > 1:  # by output: [units · d_model, width]
            return found.view(len(units), -1, unit.width).transpose(1, 2).flatten(0, 1).contiguous()
        return found

    gate = rows("gate") if any(row.role == "gate" for row in unit.rows) else None
    return FfnRows(gate, rows("up"), rows("down"))


def _shadow(store: Store) -> Shadow | None:
    """The store's own low-bit copy, where it has one: what a ring will compute with, rounded already."""
    return Shadow.open(store) if path_of(store).is_file() else None


def _shadowed(shadow: Shadow, index: int) -> FfnRows:
    unit = shadow.unit(index)
    memory = np.empty((shadow.units(index), unit.stride), np.uint8)
    shadow.read(index, memory)
    return _widened(memory, unit)


def _copy(ffn: Ffn, rows: FfnRows, copy: Copy) -> FfnRows:
    gate = None if rows.gate is None else torch.from_numpy(copy.rounded(rows.gate.numpy()))
    up = torch.from_numpy(copy.rounded(rows.up.numpy()))
    return FfnRows(gate, up, torch.from_numpy(copy.rounded_down(ffn, rows.down.numpy())))
