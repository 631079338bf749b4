"""The shadow on the CPU: the kernels of a token and of a prompt, over units in few bits that never leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.ring.plan import Forecast
from storage.codecs import F32
from storage.files import drop_cache
from storage.layout import Unit
from storage.shadow import Shadow as ShadowFile
from workers.compute.bound import BoundModel, BoundNorm, Source
from workers.compute.cpu.batch import BatchFfn
from workers.compute.cpu.pool import Pool
from workers.compute.cpu.token import TokenFfn, TokenUnits
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
    lengths: F32  # [neurons]: of the full down rows


@dataclass(frozen=True, slots=True)
class Bridge:
    """From the FFN input of one layer to what the same stream would be behind the next layer's norm."""

    scale: F32  # [d_model]
    shift: F32  # [d_model], or 0

    @classmethod
    def of(cls, before: BoundNorm, after: BoundNorm) -> Bridge:
        was, will = (one.weight + np.float32(one.norm.offset) for one in (before, after))
        divisor: F32 = np.where(was == 0, np.float32(1), was)
        scale: F32 = np.divide(will, divisor, dtype=np.float32)
        shift: F32 = np.zeros(1, np.float32)
        if before.bias.size:
            shift = shift - before.bias * scale
        if after.bias.size:
            shift = shift + after.bias
        return cls(scale, shift)


def read(file: ShadowFile) -> list[Layer]:
    """All layers. Raises StoreError for a damaged file."""
    found = []
    for index in range(len(file.store.layout.layers)):
        unit, units = file.unit(index), file.units(index)
        memory = aligned(units * unit.stride).reshape(units, unit.stride)
        found.append(Layer(unit, memory, file.read(index, memory)))
    with file.file.path.open("rb") as opened:
        drop_cache(opened.fileno())  # so that the page cache keeps no second copy
    return found


class CpuShadow:
    """`shadow.Shadow` over numpy arrays. Results do not depend on the number of threads."""

    def __init__(self, source: Source, layers: Sequence[Layer], forecast: Forecast, threads: int) -> None:
        self._architecture, self._forecast = source.architecture, forecast
        self._bound = BoundModel.of(source).layers
        self._layers = layers
        ffns = [one.ffn for one in self._architecture.layers]
        self._units = [
            TokenUnits(bound, UnitRows(one.unit), ffn, threads)
            for bound, one, ffn in zip(self._bound, layers, ffns, strict=True)
        ]
        self._pool = Pool(threads)
        self._ids: I32 = np.arange(max(len(one.memory) for one in layers), dtype=np.int32)
        neurons = max(one.lengths.size for one in layers)
        self._activations = np.empty(neurons, np.float32)  # of the layer at hand
        self._index = 0  # the layer of the last choice
        self._chosen: Ids = NOTHING
        self._bridges = [self._bridge(index) for index in range(len(layers))]

    def choose(self, index: int, x: F32) -> Choice:
        self._index = index
        choice = self._graded(self._scores(index, x[0]), index)
        self._chosen = choice.certain
        return choice

    def _scores(self, index: int, x: F32) -> F32:
        """How much each neuron can add, [neurons]; its activation stays in `_activations`."""
        layer = self._layers[index]
        activations, ids = self._activations[: layer.lengths.size], self._ids[: len(layer.memory)]
        self._units[index].activate(ids, ids, layer.memory, x, activations)
        scores: F32 = np.abs(activations) * layer.lengths
        return scores

    def foresees(self, index: int) -> bool:
        return self._bridges[index] is not None

    def foresee(self, index: int, x: F32) -> Ids:
        bridge = self._bridges[index]
        assert bridge is not None
        return self._graded(self._scores(index, x[0] * bridge.scale + bridge.shift), index).certain

    def _bridge(self, index: int) -> Bridge | None:
        """None where the layer is the first, or parallel: that one knows its input early enough."""
        layers = self._architecture.layers
        if index == 0 or layers[index].parallel:
            return None
        before, after = (self._bound[one].norms.get("ffn_input") for one in (index - 1, index))
        if before is None or after is None or "ffn_input" not in layers[index - 1].norms:
            return None
        return Bridge.of(before, after)

    def _graded(self, scores: F32, index: int) -> Choice:
        """The units of the largest scores, of equal ones the first."""
        if self._forecast.thresholds:
            threshold = np.float32(self._forecast.thresholds[index])
            return self._with_doubtful(scores, (scores > threshold).nonzero()[0], threshold)
        count = round(self._forecast.full_rows * scores.size)
        if count in (0, scores.size):
            return Choice(np.arange(count), NOTHING)
        threshold = np.partition(scores, scores.size - count)[scores.size - count]
        certain = (scores >= threshold).nonzero()[0]
        if certain.size > count:
            equal = (scores[certain] == threshold).nonzero()[0]
            certain = np.delete(certain, equal[count - certain.size :])
        return self._with_doubtful(scores, certain, threshold)

    def _with_doubtful(self, scores: F32, certain: Ids, threshold: np.float32) -> Choice:
        if not self._forecast.cache_aware:
            return Choice(certain, NOTHING)
        likely = scores > RESIDENT * threshold
        likely[certain] = False
        return Choice(certain, likely.nonzero()[0])

    def settle(self, ids: Ids) -> None:
        self._chosen = ids

    def rest(self) -> F32:
        layer = self._layers[self._index]
        activations, ids = self._activations[: layer.lengths.size], self._ids[: len(layer.memory)]
        activations[self._chosen] = 0
        output = np.zeros(layer.unit.d_model, np.float32)
        self._units[self._index].accumulate(ids, ids, layer.memory, activations, output)
        return output[None]

    def ffn(self, index: int, x: F32, every: bool) -> F32:
        layer, bound = self._layers[index], self._bound[index]
        described = self._architecture.layers[index].ffn
        whole: BatchFfn | TokenFfn
        if every:
            whole = BatchFfn(bound, layer.unit, described, x, self._pool)
        else:
            whole = TokenFfn(self._units[index], x[0], self._activations)
        ids = self._ids[: len(layer.memory)]
        whole.add(ids, ids, layer.memory)
        whole.close()
        return whole.finish()

    def close(self) -> None:
        self._pool.close()
