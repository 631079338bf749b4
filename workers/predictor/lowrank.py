"""Trained predictors: score = up @ (down @ x) + bias, one pair of thin matrices per layer.

FORMAT.md describes the file. The maps stay in float16, as they are in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ring.plan import Forecast
from storage.codecs import FLOAT16
from storage.errors import StoreError
from storage.predictors import check_sum
from storage.store import Store
from storage.tensors import Tensors
from workers import kernels
from workers.predictor.scorer import F32, NOTHING, Ids, Mask, Scorer

AHEAD, OWN = "layers", "inlayer"  # prefixes: trained for the file's look-ahead, and for 0
REMEDY = "make predictors with `run.py train-predictor`"


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's map."""

    down: npt.NDArray[Any]  # [rank, d_model] float16 as uint16
    up: npt.NDArray[Any]  # [rank, d_ff] likewise: the file's matrix, transposed
    bias: F32  # [d_ff]
    scale: np.float32  # of the input
    guess: float = 0.0  # what the score of a guess must exceed
    resident: float = 0.0  # what a resident neuron's score must exceed, where that is looked at
    absent: float = 0.0  # and that of one that would have to be read

    @classmethod
    def read(
        cls, file: Tensors, prefix: str, d_ff: int, d_model: int, shared: LowRank | None = None
    ) -> LowRank:
        """The matrices may be left out where they are those of `shared`.

        Raises StoreError for tensors that are absent or do not fit the model.
        """
        if shared is not None and f"{prefix}.down" not in file:
            down, up = shared.down, shared.up
        else:
            down = _half(file, f"{prefix}.down")
            if down.ndim != 2 or down.shape[1] != d_model:
                raise StoreError(f"{file.path} holds {prefix}.down as {down.shape}, not (rank, {d_model})")
            up = np.ascontiguousarray(_half(file, f"{prefix}.up", (d_ff, down.shape[0])).T)
        bias = file.vector(f"{prefix}.bias", (d_ff,))
        scaled = f"{prefix}.scale" in file
        scale = file.vector(f"{prefix}.scale", (1,))[0] if scaled else np.float32(1)
        thresholds = {
            name: float(file.vector(f"{prefix}.{name}", (1,))[0])
            for name in ("guess", "resident", "absent")
            if f"{prefix}.{name}" in file
        }
        if not (np.isfinite(bias).all() and all(map(math.isfinite, (scale, *thresholds.values())))):
            raise StoreError(f"{file.path} is damaged: {prefix} holds numbers that are none")
        return cls(down, up, bias, np.float32(scale), **thresholds)

    def guessing(self) -> LowRank:
        """The map for guesses, which should waste few reads: a set follows them."""
        return replace(self, bias=self.bias - np.float32(self.guess), guess=0.0, resident=0.0, absent=0.0)

    def score(self, x: F32, out: F32) -> None:
        """Write the scores [d_ff] of one hidden row x [d_model]."""
        kernels.score(FLOAT16, self.down, self.up, x, self.scale, self.bias, out)


def _half(file: Tensors, name: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
    tensor = file.read(name, shape)
    if file.dtype(name) != "float16":
        raise StoreError(f"{file.path} holds {name} as {file.dtype(name)}, not float16")
    return tensor


class LowRankScorer(Scorer):
    """All layers' maps: for guesses and early sets `ahead`, for a layer's own input `own`."""

    def __init__(
        self,
        ahead: Mapping[int, LowRank],
        own: Mapping[int, LowRank],
        threshold: float = 0.0,
        cache_aware: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.notes = notes
        self.maps = (ahead, own)
        self._threshold = threshold
        self._cache_aware = cache_aware
        most = max((one.bias.size for maps in self.maps for one in maps.values()), default=0)
        self._scores = np.empty(most, np.float32)  # of one layer
        self._ids = np.empty((2, most), np.intp)  # certain and doubtful ones

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        mask: Mask = self._score(self.maps[own][layer], hidden) > np.float32(self._threshold)
        return mask

    def wanted(self, layer: int, hidden: F32, own: bool) -> tuple[Ids, Ids]:
        """The answer is overwritten by the next one."""
        one = self.maps[own][layer]
        scores = self._score(one, hidden)
        certain, doubtful = self._ids
        if not self._cache_aware:
            return certain[: kernels.passing(scores, self._threshold, math.inf, certain)], NOTHING
        resident = one.resident + self._threshold
        absent = max(one.absent + self._threshold, resident)
        many = kernels.passing(scores, absent, math.inf, certain)
        some = kernels.passing(scores, resident, absent, doubtful)
        return certain[:many], doubtful[:some]

    def _score(self, one: LowRank, hidden: F32) -> F32:
        scores = self._scores[: one.bias.size]
        one.score(hidden, scores)
        return scores


def load(store: Store, name: str, forecast: Forecast, threshold: float) -> LowRankScorer:
    """The store's predictors `name`, for a ring of this forecast; pinned layers need none.

    Whether the file can do what the forecast says, `pipeline/planner/resolve.py` has decided. Sets need maps
    of their own look-ahead; guesses take the layer's own where there are no better. Raises StoreError, naming
    the command that helps, for predictors that are missing, of another model, or not of every layer.
    """
    lookahead, refines = forecast.lookahead, forecast.refines
    file = open_file(store, name)
    trained = int(file.metadata.get("lookahead", "0"))
    wanted = [layer for layer in range(len(store.layout.layers)) if layer not in forecast.pinned]
    own = _maps(file, OWN, wanted, store)
    ahead = _maps(file, AHEAD, wanted, store, own) if refines or trained in {0, lookahead} else {}
    if trained == 0:
        own, ahead = own or ahead, {}
    sets = own if forecast.from_own_input else ahead
    if lacking := [layer for layer in wanted if layer not in sets]:
        needed = f"for look-ahead {0 if sets is own else lookahead}"
        raise StoreError(f"{file.path} has no map {needed} of layer {lacking[0]}: {REMEDY}")
    notes: tuple[str, ...] = ()
    if refines and not (trained == lookahead and len(ahead) == len(wanted)):
        notes = (f"guesses by predictors of another look-ahead than {lookahead}",)
    early = {**own, **ahead}
    if refines:
        early = {layer: one.guessing() for layer, one in early.items()}
    return LowRankScorer(early, sets, threshold, forecast.cache_aware, notes)


def open_file(store: Store, name: str) -> Tensors:
    """The predictors' file, checked to be this store's."""
    path = store.predictors(name)
    if not path.is_file():
        raise StoreError(f"{store.path} has no predictors named {name}: {REMEDY}")
    file = Tensors(path)
    if file.metadata.get("kind") != "lowrank":
        raise StoreError(f"{path} is not a file of low-rank predictors: {REMEDY}")
    if file.metadata.get("store") != store.identity:
        raise StoreError(f"{path} was trained for other weights than this store's: {REMEDY}")
    check_sum(file)
    return file


def _maps(
    file: Tensors, prefix: str, layers: list[int], store: Store, own: Mapping[int, LowRank] | None = None
) -> dict[int, LowRank]:
    """The maps that the file has under `prefix`; they may share the matrices of the layers' `own`."""
    units, d_model = store.layout.units, store.architecture.d_model
    return {
        layer: LowRank.read(file, f"{prefix}.{layer}", units[layer], d_model, (own or {}).get(layer))
        for layer in layers
        if f"{prefix}.{layer}.bias" in file
    }
