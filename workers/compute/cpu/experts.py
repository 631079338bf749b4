"""An FFN of experts on the CPU, of a shared part, or of both; of one token, and of many.

Every expert's output is kept apart until its group of parts is closed, and summed in ascending id then: the
sum does not depend on which parts came first. Groups ascend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.ring.plan import ROWS, ROWS_APART
from storage.architecture import Ffn
from storage.codecs import F32
from storage.layout import I32, Role, Unit
from workers import kernels
from workers.compute.bound import BoundLayer, BoundShared, Linear
from workers.compute.cpu.pool import Pool
from workers.compute.cpu.units import UnitRows
from workers.compute.device import Bytes
from workers.routing import Ids, Routing, route, weigh


def routed(ffn: Ffn, logits: F32) -> Routing:
    """Of a router's products [rows, experts], which have the bits that each row has alone."""
    assert ffn.router is not None
    return kernels.choose(ffn.router, logits) if len(logits) == 1 else route(ffn.router, logits)


def resettled(ffn: Ffn, routing: Routing | None, ids: Ids) -> Routing:
    """Other experts for the same rows, weighed by the same router."""
    assert ffn.router is not None
    assert routing is not None, "experts of rows that no router has seen"
    return weigh(ffn.router, routing.logits, ids)


def of_shared(ffn: Ffn, shared: BoundShared, x: F32, product: Callable[[Linear, F32], F32]) -> F32:
    """The output of what every token has, of one row or of many."""
    a = activated(ffn, product(shared.gate, x), product(shared.up, x))
    output = product(shared.down, a)
    if shared.switch is not None:
        output *= np.float32(1) / (np.float32(1) + np.exp(-product(shared.switch, x)))
    return output


class TokenExperts:
    """One layer's FFN of one token. Experts are computed as they come, whatever else is under way."""

    def __init__(
        self,
        bound: BoundLayer,
        rows: UnitRows,
        ffn: Ffn,
        x: F32,
        routing: Routing | None,
        shared: F32 | None,
        threads: int,
    ) -> None:
        """x [d_model]; `routing` is its one row's, None without experts; `shared` [d_model] is added."""
        self._bound, self._rows, self._ffn, self._input, self._threads = bound, rows, ffn, x, threads
        self._weights = np.zeros(ffn.units, np.float32)
        self._chosen = np.zeros(ffn.units, np.bool_)
        if routing is not None:
            self._weights[routing.ids[0]] = routing.weights[0]
            self._chosen[routing.ids[0]] = True
        self._kept: list[tuple[I32, F32]] = []  # ids [n] and outputs [n, d_model] of the group's parts
        self._output = np.zeros_like(x)
        self._shared = shared
        self.active = 0  # experts

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        wanted = self._chosen[ids]
        ids, slots = ids[wanted], slots[wanted]
        if not ids.size:
            return
        rows, biases = self._rows.of(memory), (self._bound.gate_bias, self._bound.up_bias)
        three = rows["gate"], rows["up"], rows["down"]
        found = kernels.outputs(three, ids, slots, self._input, biases, self._ffn, self._threads)
        if self._bound.down_bias.size:
            found += self._bound.down_bias.reshape(self._ffn.units, -1)[ids]
        self._kept.append((ids, found))
        self.active += ids.size

    def forget(self, ids: I32) -> None:
        """As `ApartFfn.forget`."""
        kept = []
        for some, found in self._kept:
            right = ~np.isin(some, ids)
            self.active -= some.size - int(np.count_nonzero(right))
            kept.append((some[right], found[right]))
        self._kept = kept

    def close(self) -> None:
        if not self._kept:
            return
        ids, found = self._kept[0]
        if len(self._kept) > 1:
            ids, found = (np.concatenate(several) for several in zip(*self._kept, strict=True))
        self._kept.clear()
        kernels.add_weighted(found, ids, self._weights[ids], self._output)

    def finish(self) -> F32:
        assert self.active == np.count_nonzero(self._chosen), "an expert has not come"
        if self._shared is not None:
            self._output += self._shared
        return self._output[None]


@dataclass(frozen=True, slots=True)
class _Task:
    """Some tokens of one expert; the expert lies in `slot`."""

    expert: int
    slot: int
    rows: Ids  # ascending
    weights: F32


class BatchExperts:
    """One layer's FFN of many tokens: each expert with the tokens that chose it, others are left out."""

    def __init__(
        self,
        bound: BoundLayer,
        unit: Unit,
        ffn: Ffn,
        x: F32,
        routing: Routing | None,
        shared: F32 | None,
        pool: Pool,
    ) -> None:
        """x [n, d_model]; `routing` is None without experts; `shared` [n, d_model] is added."""
        self._bound, self._unit, self._ffn, self._input, self._pool = bound, unit, ffn, x, pool
        self._routing = routing
        self._parts: list[tuple[I32, I32]] = []
        self._memory: Bytes | None = None
        self._output = np.zeros_like(x)
        self._shared = shared
        self._open = 0 if routing is None else routing.ids.size  # outputs that are not there yet
        self.active = 0  # not counted

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        if ids.size:
            self._parts.append((ids, slots))
            self._memory = memory

    def close(self) -> None:
        if self._memory is None:
            return
        ids, slots = (np.concatenate(several) for several in zip(*self._parts, strict=True))
        order = np.argsort(ids, kind="stable")
        self._run(self._tasks(ids[order], slots[order]), self._memory)
        self._parts.clear()
        self._memory = None

    def finish(self) -> F32:
        assert self._open == 0, "an expert has not come"
        return self._output if self._shared is None else self._output + self._shared

    def _tasks(self, ids: I32, slots: I32) -> list[_Task]:
        assert self._routing is not None
        tasks = []
        for expert, slot in zip(ids.tolist(), slots.tolist(), strict=True):
            rows, places = np.nonzero(self._routing.ids == expert)
            weights = self._routing.weights[rows, places]
            self._open -= rows.size
            for start in range(0, rows.size, ROWS):
                some = slice(start, start + ROWS)
                tasks.append(_Task(expert, slot, rows[some], weights[some]))
        return tasks

    def _run(self, tasks: Sequence[_Task], memory: Bytes) -> None:
        """Outputs are summed in the tasks' order, while later ones are computed."""
        computed = self._pool.in_order(
            lambda task: self._of_expert(task, memory), tasks, lambda task: task.rows.size, ROWS_APART
        )
        for task, output in zip(tasks, computed, strict=True):
            self._output[task.rows] += output

    def _of_expert(self, task: _Task, memory: Bytes) -> F32:
        """What the expert adds to its tokens, [rows, d_model]."""
        width, d_model = self._ffn.width, self._input.shape[1]
        x = kernels.in_panels(self._input, task.rows)
        neurons = slice(task.expert * width, (task.expert + 1) * width)
        gate = self._product(memory, "gate", task, x, self._bound.gate_bias[neurons])
        up = self._product(memory, "up", task, x, self._bound.up_bias[neurons])
        outputs = slice(task.expert * d_model, (task.expert + 1) * d_model)
        a = activated(self._ffn, gate, up)
        down = self._product(memory, "down", task, a, self._bound.down_bias[outputs])
        found = kernels.out_of_panels(down, np.empty((task.rows.size, d_model), np.float32))
        found *= task.weights[:, None]
        return found

    def _product(self, memory: Bytes, role: Role, task: _Task, x: F32, bias: F32) -> F32:
        """Of the expert's rows with its tokens, in panels; the bias may be empty."""
        rows = self._unit.view(memory, role)
        out = kernels.new_panels(task.rows.size, rows.count, bias)
        kernels.multiply(rows, task.slot * rows.count + np.arange(rows.count), x, out)
        return out


def activated(ffn: Ffn, gate: F32, up: F32) -> F32:
    """A gated FFN's activations from its products [..., n], in the place of the gate's."""
    kernels.activations(gate.reshape(-1, gate.shape[-1]), ffn.activation, *ffn.numbers)
    if ffn.up_activation == "clamped":
        up = np.clip(up, -ffn.limit, ffn.limit) + np.float32(1)
    gate *= np.maximum(up, 0) if ffn.up_activation == "relu" else up
    return gate
