"""The ring's predictions for many tokens at once: what `scoring.py` masks the FFN with.

The set that the ring computes comes from the layer's own FFN input with refine or look-ahead 0, else
from that of the layer `lookahead` before, or the embedding. Guesses are here as well, though they
only start reads: traces count what they cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipeline.config import Config
from pipeline.planner.divide import plan
from pipeline.planner.resolve import resolve
from pipeline.ring.messages import EMBEDDING
from pipeline.ring.plan import Forecast
from storage.errors import ConfigError
from storage.store import Decider, Store
from workers.cache.policies import make_policy
from workers.cache.residency import Residency
from workers.lab.offline.dense import Rest
from workers.lab.offline.replay import turn
from workers.lab.offline.shadow import ShadowScores
from workers.predictor import lowrank
from workers.predictor.lowrank import LowRank
from workers.predictor.oracle import MARGIN


class Scores(Protocol):
    """A kind of predictor, loaded: which neurons of a layer its source rows predict."""

    def active(self, layer: int, source: torch.Tensor, own: bool) -> torch.Tensor:
        """`[n, d_ff]` bool of `[n, d_model]`; `own`: the rows are the layer's own FFN inputs."""


class LowRankScores:
    """The store's trained maps, widened to float32."""

    def __init__(self, maps: tuple[Mapping[int, LowRank], Mapping[int, LowRank]], threshold: float) -> None:
        """`maps`: for earlier sources, and for a layer's own input."""
        self._maps = [{layer: _Wide.of(one) for layer, one in some.items()} for some in maps]
        self.threshold = threshold

    def active(self, layer: int, source: torch.Tensor, own: bool) -> torch.Tensor:
        return self._maps[own][layer].scores(source) > self.threshold

    def graded(self, layer: int, source: torch.Tensor, own: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What is wanted where it is resident, and of it what is wanted in any case; `[n, d_ff]` each."""
        one = self._maps[own][layer]
        scores = one.scores(source) - self.threshold
        return scores > one.resident, scores > one.absent


@dataclass(frozen=True, slots=True)
class _Wide:
    """One layer's map in torch, float32."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    scale: float
    resident: float
    absent: float

    @classmethod
    def of(cls, one: LowRank) -> _Wide:
        down, up = (torch.from_numpy(part.view(np.float16)).float() for part in (one.down, one.up))
        return cls(down, up, torch.from_numpy(one.bias), float(one.scale), one.resident, one.absent)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, (x * self.scale) @ self.down.T, self.up)


class OracleScores:
    """The true active set, by what decides it; `margin` as the ring's oracle."""

    def __init__(self, store: Store, margin: float = MARGIN) -> None:
        self._store, self._margin = store, margin

    def active(self, layer: int, source: torch.Tensor, own: bool) -> torch.Tensor:
        return positive(self._store.deciding(layer), source, self._margin)


def positive(deciding: Sequence[Decider], source: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Where everything that decides exceeds zero, or nearly so: `[n, d_ff]` bool of `[n, d_model]`."""
    mask = torch.ones(1, dtype=torch.bool)
    for one in deciding:
        scores = torch.addmm(torch.from_numpy(one.bias), source, torch.from_numpy(one.rows.widened()).T)
        scale = scores.square().mean(dim=1, keepdim=True).sqrt()
        mask = mask & (scores > -margin * scale)
    return mask


class RingChooser:
    """Chooses, for a layer and its source rows, as the ring of this forecast does."""

    def __init__(self, forecast: Forecast, scores: Scores) -> None:
        self.forecast = forecast
        self.scores = scores

    @property
    def early(self) -> bool:
        return self.forecast.early

    @property
    def prefills(self) -> bool:
        """Whether a prompt has every neuron."""
        return not self.forecast.low

    @property
    def rest(self) -> Rest | None:
        """What neurons that are not chosen add all the same."""
        return self.scores.rest if isinstance(self.scores, ShadowScores) else None

    def sources(self, layer: int) -> int:
        if self.forecast.from_own_input:
            return layer
        return self.guess_source(layer)

    def guess_source(self, layer: int) -> int:
        """Where the early prediction of a layer comes from."""
        lookahead = self.forecast.lookahead
        return layer - lookahead if layer >= lookahead else EMBEDDING

    def choose(
        self, layer: int, source: torch.Tensor, guessed: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The layer's set for each source row; None: every neuron. What was `guessed` does not matter."""
        if layer in self.forecast.pinned:
            return None
        return self.scores.active(layer, source, self.forecast.from_own_input)

    def guess(self, layer: int, source: torch.Tensor) -> torch.Tensor | None:
        """The neurons whose reads start early; None where there are no guesses."""
        if not self.forecast.refines or layer in self.forecast.pinned:
            return None
        return self.scores.active(layer, source, own=False)


class CacheAwareChooser(RingChooser):
    """Chooses by what is resident, too: its source rows are the tokens of one ring's life, in their order."""

    def __init__(
        self, forecast: Forecast, scores: LowRankScores | ShadowScores, residencies: Sequence[Residency]
    ) -> None:
        """`residencies`: every layer's, as a ring starts with them."""
        super().__init__(forecast, scores)
        self._graded = scores
        self._residencies = residencies
        self._steps = [0] * len(residencies)

    def choose(
        self, layer: int, source: torch.Tensor, guessed: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if layer in self.forecast.pinned:
            return None
        likely, sure = (
            mask.numpy() for mask in self._graded.graded(layer, source, self.forecast.from_own_input)
        )
        residency = self._residencies[layer]
        chosen = np.zeros_like(likely)
        for row in range(len(source)):
            certain = np.flatnonzero(likely[row] & sure[row])
            doubtful = np.flatnonzero(likely[row] & ~sure[row])
            guess = None if guessed is None else np.flatnonzero(guessed[row].numpy())
            turn(residency, self._steps[layer], certain, guess, doubtful)
            # A doubtful one that was resident still is.
            chosen[row, residency.settle(certain, doubtful)] = True
            self._steps[layer] += 1
        return torch.from_numpy(chosen)


def make_chooser(store: Store, config: Config, in_order: bool = False) -> RingChooser | None:
    """What the ring of this configuration would choose; None: every neuron, or a router decides.

    `in_order`: source rows will come as the tokens of one ring's life, which cache-aware choice needs.
    Raises ConfigError and StoreError as the ring's start does.
    """
    forecast = resolve(store, config).forecast
    if forecast.every or forecast.kind == "router":  # which every device chooses by itself
        return None
    if forecast.kind == "oracle":
        return RingChooser(forecast, OracleScores(store))
    scores: LowRankScores | ShadowScores
    if forecast.shadowed:
        scores = ShadowScores(store, forecast)
    else:
        scorer = lowrank.load(store, config.model.predictor, forecast, 0.0)
        scores = LowRankScores(scorer.maps, config.predictor.threshold)
    if not forecast.cache_aware:
        return RingChooser(forecast, scores)
    if not in_order:
        raise ConfigError("predictor.cache_aware needs tokens in their order: evaluate it by --point")
    divided = plan(store, config, available=0).plan  # on every machine the same slots
    residencies = [
        Residency(units, slots, make_policy(units, config.cache))
        for units, slots in zip(divided.units, divided.slots, strict=True)
    ]
    return CacheAwareChooser(forecast, scores, residencies)
