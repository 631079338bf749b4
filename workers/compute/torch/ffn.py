"""One layer's FFN over tensors: of neurons, and of experts.

A group's units are sorted by id when it closes, and groups ascend: so the whole set comes in ascending order,
whatever its parts were, and is summed in blocks that are cut by its order alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.ring.plan import WIDENED
from storage.architecture import Ffn
from storage.layout import Role, Unit, neurons_of
from workers.compute.device import I32, Bytes, Mask
from workers.compute.torch.shelf import Piece, Shelf
from workers.compute.torch.weights import PlacedLayer
from workers.compute.torch.widening import rows_of
from workers.routing import Routing


class _Group:
    """The parts of a group, and their units sorted when it closes."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._pieces: list[Piece] = []

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        if ids.size:
            self._pieces += self._shelf.bring(ids, slots, memory)

    def close(self) -> tuple[I32, Tensor] | None:
        """Ids [n], ascending, and their units [n, stride]; None of an empty group."""
        if not self._pieces:
            return None
        ids = np.concatenate([piece.ids for piece in self._pieces])
        order = np.argsort(ids, kind="stable")
        units = self._shelf.gather(self._pieces, order)
        self._pieces.clear()
        return ids[order], units


class TorchFfn:
    """An FFN of neurons, of any number of rows."""

    def __init__(
        self, bound: PlacedLayer, unit: Unit, ffn: Ffn, x: Tensor, mask: Mask | None, shelf: Shelf
    ) -> None:
        """x [rows, d_model]; mask [rows, neurons], where given, silences neurons."""
        self._bound, self._unit, self._ffn, self._input = bound, unit, ffn, x
        self._mask = None if mask is None else torch.from_numpy(mask).to(x.device)
        self._group = _Group(shelf)
        self._per_block = max(1, WIDENED // (4 * len(unit.rows) * unit.width * unit.d_model))
        self._ids = np.zeros(0, np.int32)  # of units that wait for their block to be full
        self._units: list[Tensor] = []
        self._output = torch.zeros_like(x)
        if bound.down_bias.numel():
            self._output += bound.down_bias
        self.nonzero: Tensor | None = None  # activations, counted on the device
        self.active = 0  # not counted here: that would make the host wait

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        self._group.add(ids, slots, memory)

    def close(self) -> None:
        found = self._group.close()
        if found is None:
            return
        ids, units = found
        self._ids = np.concatenate((self._ids, ids))
        self._units.append(units)
        if self._ids.size < self._per_block:
            return
        waiting = self._waiting()
        whole = self._ids.size // self._per_block * self._per_block
        for start in range(0, whole, self._per_block):
            some = slice(start, start + self._per_block)
            self._sum(self._ids[some], waiting[some])
        self._ids, self._units = self._ids[whole:], [waiting[whole:].clone()]

    def finish(self) -> Tensor:
        if self._ids.size:
            self._sum(self._ids, self._waiting())
        return self._output

    def _waiting(self) -> Tensor:
        return self._units[0] if len(self._units) == 1 else torch.cat(self._units)

    def _sum(self, ids: I32, units: Tensor) -> None:
        """Add some units [n, stride]."""
        which = torch.from_numpy(neurons_of(ids, self._unit.width).astype(np.int64))
        which = which.to(units.device, non_blocking=True)
        a = self._product("up", units, which, self._bound.up_bias)
        if self._ffn.kind == "gated":
            a = gated(self._ffn, self._product("gate", units, which, self._bound.gate_bias), a)
        else:
            a = activated(self._ffn, a)
        if self._mask is not None:
            a = a * self._mask[:, which]
        count = torch.count_nonzero(a)
        self.nonzero = count if self.nonzero is None else self.nonzero + count
        down = rows_of(units, self._unit, "down")
        if self._unit.width > 1:  # by output: [units, d_model, width]
            down = down.transpose(1, 2)
        self._output = torch.addmm(self._output, a, down.reshape(-1, self._unit.d_model))

    def _product(self, role: Role, units: Tensor, which: Tensor, bias: Tensor) -> Tensor:
        """Of every row with a role's, [rows, n]."""
        product = functional.linear(self._input, rows_of(units, self._unit, role).flatten(0, 1))
        return product + bias[which] if bias.numel() else product


class TorchExperts:
    """An FFN of experts, each computed with the rows that chose it; summed by ascending id.

    One row's experts are computed together, when all have come: then their products do not depend on how many
    came at a time.
    """

    def __init__(
        self,
        bound: PlacedLayer,
        unit: Unit,
        ffn: Ffn,
        x: Tensor,
        routing: Routing | None,
        shared: Tensor | None,
        shelf: Shelf,
    ) -> None:
        """x [rows, d_model]; `routing` is None without experts, `shared` the shared part's output."""
        self._bound, self._unit, self._ffn, self._input = bound, unit, ffn, x
        self._routing, self._shared = routing, shared
        self._group = _Group(shelf)
        self._chosen = np.zeros(ffn.units, np.bool_)
        if routing is not None:
            self._chosen[routing.ids] = True
        self._together: list[tuple[I32, Tensor]] = []  # of one row
        self._output = torch.zeros_like(x)
        self.active = 0

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        wanted = self._chosen[ids]
        self.active += int(np.count_nonzero(wanted))
        self._group.add(ids[wanted], slots[wanted], memory)

    def close(self) -> None:
        found = self._group.close()
        if found is None:
            return
        if len(self._input) == 1:
            self._together.append(found)
            return
        assert self._routing is not None
        for number, expert in enumerate(found[0].tolist()):
            rows, places = np.nonzero(self._routing.ids == expert)
            which = torch.from_numpy(rows).to(self._input.device)
            weights = self._here(self._routing.weights[rows, places])
            ids = np.array([expert])
            output = self._of(found[1][number : number + 1], ids, self._input[which][None])[0]
            self._output[which] += weights[:, None] * output

    def finish(self) -> Tensor:
        assert self.active == np.count_nonzero(self._chosen), "an expert has not come"
        if self._together:
            assert self._routing is not None
            ids = np.concatenate([some for some, _ in self._together])
            units = torch.cat([some for _, some in self._together])
            outputs = self._of(units, ids, self._input[None].expand(len(ids), -1, -1))
            weights = self._here(self._routing.weights[0])  # of ids that ascend, as these do
            self._output = (weights[:, None, None] * outputs).sum(0)
        return self._output if self._shared is None else self._output + self._shared

    def _of(self, units: Tensor, ids: npt.NDArray[np.integer[Any]], x: Tensor) -> Tensor:
        """What experts `ids` make of x [experts, rows, d_model]; the same shape."""

        def product(role: Role, x: Tensor, bias: Tensor) -> Tensor:
            found = torch.bmm(x, rows_of(units, self._unit, role).transpose(1, 2))
            return found + bias.view(self._ffn.units, -1)[which][:, None] if bias.numel() else found

        which = self._here(ids.astype(np.int64))
        gate = product("gate", x, self._bound.gate_bias)
        a = gated(self._ffn, gate, product("up", x, self._bound.up_bias))
        return product("down", a, self._bound.down_bias)

    def _here(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._input.device)


def gated(ffn: Ffn, gate: Tensor, up: Tensor) -> Tensor:
    """A gated FFN's activations from its products."""
    match ffn.up_activation:
        case "relu":
            up = functional.relu(up)
        case "clamped":
            up = up.clamp(-ffn.limit, ffn.limit) + 1
    return activated(ffn, gate) * up


def activated(ffn: Ffn, x: Tensor) -> Tensor:
    """The FFN's activation function of x."""
    match ffn.activation:
        case "relu":
            return functional.relu(x)
        case "fatrelu":
            return functional.threshold(x, ffn.threshold, 0.0)
        case "silu":
            return functional.silu(x)
        case "clamped_silu":
            x = x.clamp(max=ffn.limit)
            return x * torch.sigmoid(ffn.alpha * x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
