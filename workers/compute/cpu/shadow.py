"""The shadow on the CPU: the kernels of a token and of a prompt, over units in few bits that never leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.ring.plan import Forecast
from storage.codecs import F32
from storage.layout import Unit
from storage.shadow import Shadow as ShadowFile
from workers import kernels
from workers.compute.bound import BoundModel, Source
from workers.compute.cpu.batch import BatchFfn
from workers.compute.cpu.pool import Pool
from workers.compute.cpu.token import TokenFfn
from workers.compute.cpu.units import UnitRows
from workers.compute.device import I32, Bytes
from workers.compute.shadow import Choice
from workers.compute.weights import aligned
from workers.predictor.scorer import NOTHING
from workers.routing import Ids

RESIDENT = 0.5  # of a score's threshold: what a unit must exceed that need not be read, under `cache_aware`


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's units in few bits, and what their activations are multiplied with for a score."""

    unit: Unit
    memory: Bytes  # [units, stride]
    lengths: F32  # [units]: of the full down rows


def read(file: ShadowFile) -> list[Layer]:
    """All layers. Raises StoreError for a damaged file."""
    found = []
    for index, part in enumerate(file.store.layout.layers):
        unit = file.unit(index)
        memory = aligned(part.units * unit.stride).reshape(part.units, unit.stride)
        lengths = file.read(index, memory) if part.units else np.empty(0, np.float32)
        found.append(Layer(unit, memory, lengths))
    return found


class CpuShadow:
    """`shadow.Shadow` over numpy arrays. Results do not depend on the number of threads."""

    def __init__(self, source: Source, layers: Sequence[Layer], forecast: Forecast, threads: int) -> None:
        self._architecture, self._forecast, self._threads = source.architecture, forecast, threads
        self._bound = BoundModel.of(source).layers
        self._layers = layers
        self._rows = [UnitRows(one.unit) for one in layers]
        self._pool = Pool(threads)
        most = max(len(one.memory) for one in layers)
        self._ids: I32 = np.arange(most, dtype=np.int32)
        self._activations = np.empty(most, np.float32)  # of the layer at hand
        self._index = 0  # the layer of the last choice
        self._chosen: Ids = NOTHING

    def choose(self, index: int, x: F32) -> Choice:
        layer = self._layers[index]
        self._index = index
        activations, ids = self._activations[: len(layer.memory)], self._ids[: len(layer.memory)]
        ffn, bound, rows = self._architecture.layers[index].ffn, self._bound[index], self._rows[index]
        rows_of = rows.of(layer.memory)
        if ffn.kind == "gated":
            biases = bound.gate_bias, bound.up_bias
            kernels.activate_gated(
                rows_of["gate"], rows_of["up"], ids, ids, x[0], biases, ffn, self._threads, activations
            )
        else:
            kernels.activate(
                rows_of["up"],
                ids,
                ids,
                x[0],
                bound.up_bias,
                ffn.activation,
                self._threads,
                activations,
                ffn.threshold,
            )
        choice = self._graded(np.abs(activations) * layer.lengths)
        self._chosen = choice.certain
        return choice

    def _graded(self, scores: F32) -> Choice:
        """The units of the largest scores, of equal ones the first."""
        count = round(self._forecast.full_rows * scores.size)
        if count in (0, scores.size):
            return Choice(np.arange(count), NOTHING)
        threshold = np.partition(scores, scores.size - count)[scores.size - count]
        certain = (scores >= threshold).nonzero()[0]
        if certain.size > count:
            equal = (scores[certain] == threshold).nonzero()[0]
            certain = np.delete(certain, equal[count - certain.size :])
        if not self._forecast.cache_aware:
            return Choice(certain, NOTHING)
        likely = scores > RESIDENT * threshold
        likely[certain] = False
        return Choice(certain, likely.nonzero()[0])

    def settle(self, ids: Ids) -> None:
        self._chosen = ids

    def rest(self) -> F32:
        layer, rows = self._layers[self._index], self._rows[self._index]
        units = len(layer.memory)
        activations, ids = self._activations[:units], self._ids[:units]
        activations[self._chosen] = 0
        output = np.zeros(layer.unit.d_model, np.float32)
        kernels.accumulate(rows.of(layer.memory)["down"], ids, ids, activations, output, self._threads)
        return output[None]

    def ffn(self, index: int, x: F32, every: bool) -> F32:
        layer, bound = self._layers[index], self._bound[index]
        described = self._architecture.layers[index].ffn
        whole: BatchFfn | TokenFfn
        if every:
            whole = BatchFfn(bound, layer.unit, described, x, self._pool)
        else:
            whole = TokenFfn(bound, self._rows[index], described, x[0], self._activations, self._threads)
        ids = self._ids[: len(layer.memory)]
        whole.add(ids, ids, layer.memory)
        whole.close()
        return whole.finish()

    def close(self) -> None:
        self._pool.close()
