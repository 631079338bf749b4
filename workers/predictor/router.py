"""A mixture's routers: of a layer's own input they choose exactly the experts that compute will use.

For a guess, a later layer's router reads the row of an earlier one, brought to that layer's norm: the
residual stream changes little from one layer to the next. Published recall of that is 74 to 89 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.ring.plan import Forecast
from storage.architecture import NORM_PARTS, Layer, Router
from storage.architecture import layer as layer_part
from storage.codecs import CODECS
from storage.layout import Rows
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers import kernels
from workers.predictor.scorer import F32, NOTHING, Ids, Mask, Scorer
from workers.routing import ranked, weigh


@dataclass(frozen=True, slots=True)
class _Router:
    """One layer's, as compute holds it."""

    weight: Rows  # [experts, d_model]
    bias: F32  # [experts], or empty
    chooses: Router
    scale: F32 | None  # [d_model]: what a guess's row is multiplied with; None: nothing

    def logits(self, row: F32) -> F32:
        """[experts]."""
        return kernels.matvec(self.weight, row, 1, self.bias)

    def likeliest(self, row: F32) -> Ids:
        """[top_k], likeliest first."""
        return ranked(self.logits(row), self.chooses.top_k)


class RouterScorer(Scorer):
    """The routers of all layers that have one; the others have nothing to choose."""

    notes: tuple[str, ...] = ()

    def __init__(self, routers: dict[int, _Router], prefer: float, skip: float) -> None:
        """`prefer` and `skip`: as the forecast has them."""
        self._routers, self._prefer, self._skip = routers, prefer, skip

    @classmethod
    def load(cls, store: Store, forecast: Forecast) -> RouterScorer:
        """Raises StoreError for a router that is missing or of another shape."""
        file, layers = Tensors(store.path / RESIDENT), store.architecture.layers
        routers = {}
        for index, layer in enumerate(layers):
            if layer.ffn.router is None:
                continue
            name = layer_part(index, "router.weight")
            weight = file.read(name, (layer.ffn.units, store.architecture.d_model))
            bias_name = layer_part(index, "router.bias")
            bias = file.vector(bias_name, (layer.ffn.units,)) if bias_name in file else kernels.NO_BIAS
            rows = Rows.of_matrix(weight, CODECS[file.dtype(name)])
            scale = _scale(file, store, index, index - max(1, forecast.lookahead))
            routers[index] = _Router(rows, bias, layer.ffn.router, scale)
        return cls(routers, forecast.prefer, forecast.skip)

    def active(self, layer: int, hidden: F32, own: bool) -> Mask:
        router = self._routers[layer]
        mask: Mask = np.zeros(router.weight.memory.shape[0], np.bool_)
        mask[self._chosen(router, hidden, own)] = True
        return mask

    def wanted(self, layer: int, hidden: F32, own: bool) -> tuple[Ids, Ids]:
        """A set ascending, a guess likeliest first; with `prefer` a set as `Residency.prefer` reads it."""
        router = self._routers[layer]
        if own and (self._prefer or self._skip):
            return self._graded(router, router.logits(hidden))
        chosen = self._chosen(router, hidden, own)
        return np.sort(chosen) if own else chosen, NOTHING

    def _graded(self, router: _Router, logits: F32) -> tuple[Ids, Ids]:
        """Which experts, or their stand-ins, are wanted anyway, and which only where they are resident."""
        chosen = ranked(logits, router.chooses.top_k)
        weights = weigh(router.chooses, logits[None], chosen[None]).weights[0]
        light = weights < self._skip * weights.sum()
        light[0] = False
        certain, doubtful = chosen[~light], np.sort(chosen[light])
        if not self._prefer:
            return np.sort(certain), doubtful
        return with_stand_ins(logits, certain, chosen, self._prefer), doubtful

    def _chosen(self, router: _Router, hidden: F32, own: bool) -> Ids:
        return router.likeliest(hidden if own or router.scale is None else hidden * router.scale)


def with_stand_ins(logits: F32, certain: Ids, chosen: Ids, prefer: float) -> Ids:
    """The experts `certain`, likeliest first, and among them as ~id those that may replace them.

    Experts that are not `chosen` have their logit plus the share `prefer` of all logits' range, and precede
    those that have less; but nothing precedes the likeliest, and what follows the last certain one is no use.
    """
    others = np.ones(logits.size, np.bool_)
    others[chosen] = False
    stand_ins = others.nonzero()[0]
    bonus = np.float32(prefer) * (logits.max() - logits.min())
    keys = np.concatenate((logits[certain], logits[stand_ins] + bonus))
    keys[0] = np.inf
    order = np.argsort(-keys, kind="stable")
    last = np.flatnonzero(order == certain.size - 1)[0]
    listed: Ids = np.concatenate((certain, ~stand_ins))[order[: last + 1]]
    return listed


def _scale(file: Tensors, store: Store, index: int, source: int) -> F32 | None:
    """From a row that layer `source` announced, below 0 the embedding, to one for this layer's router."""
    norm, before = _norm_weight(file, store, index), _norm_weight(file, store, source)
    if norm is None and before is None:
        return None
    scale: F32 = np.ones(store.architecture.d_model, np.float32) if norm is None else norm
    if before is not None:
        divisor: F32 = np.where(before == 0, np.float32(1), before)
        scale = scale / divisor
    return scale


def _norm_weight(file: Tensors, store: Store, index: int) -> F32 | None:
    """What a layer's announced row has been multiplied with after it was normed; None: it is not normed."""
    if index < 0:
        return None
    layer: Layer = store.architecture.layers[index]
    router, norm = layer.ffn.router, layer.norms.get("ffn_input")
    if norm is None or (router is not None and router.reads == "layer_input"):
        return None
    name = layer_part(index, f"{NORM_PARTS['ffn_input']}.weight")
    weight: F32 = file.vector(name, (store.architecture.d_model,)) + np.float32(norm.offset)
    return weight
