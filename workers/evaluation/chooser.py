"""The ring's predictions for many tokens at once: what `scoring.py` masks the FFN with.

The set that the ring computes comes from the layer's own FFN input with refine or look-ahead 0, else
from that of the layer `lookahead` before, or the embedding. Guesses are here as well, though they
only start reads: traces count what they cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipeline.config import Config
from pipeline.messages import EMBEDDING
from pipeline.planner import pinned_layers, predicts_early, resolve
from storage.errors import ConfigError
from storage.format import Store
from workers.predictor import activations, lowrank
from workers.predictor.lowrank import LowRank
from workers.predictor.oracle import MARGIN
from workers.predictor.targets import Mode


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


@dataclass(frozen=True, slots=True)
class _Wide:
    """One layer's map in torch, float32."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    scale: float

    @classmethod
    def of(cls, one: LowRank) -> _Wide:
        down, up = (torch.from_numpy(part.view(np.float16)).float() for part in (one.down, one.up))
        return cls(down, up, torch.from_numpy(one.bias), float(one.scale))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, (x * self.scale) @ self.down.T, self.up)


class OracleScores:
    """The true active set, by the layer's up-projection; `margin` as the ring's oracle."""

    def __init__(self, store: Store, margin: float = MARGIN) -> None:
        self._store, self._margin = store, margin

    def active(self, layer: int, source: torch.Tensor, own: bool) -> torch.Tensor:
        up, bias = activations.up_projection(self._store, layer)
        scores = torch.addmm(bias, source, up.T)
        scale = scores.square().mean(dim=1, keepdim=True).sqrt()
        return scores > -self._margin * scale


class RingChooser:
    """Chooses, for a layer and its source rows, as the ring of this mode does."""

    def __init__(self, mode: Mode, scores: Scores, early: bool = False) -> None:
        self.mode = mode
        self.scores = scores
        self.early = early

    @property
    def from_own_input(self) -> bool:
        return self.mode.refines or self.mode.lookahead == 0

    def sources(self, layer: int) -> int:
        if self.from_own_input:
            return layer
        return self.guess_source(layer)

    def guess_source(self, layer: int) -> int:
        """Where the early prediction of a layer comes from."""
        return layer - self.mode.lookahead if layer >= self.mode.lookahead else EMBEDDING

    def choose(self, layer: int, source: torch.Tensor) -> torch.Tensor | None:
        if layer in self.mode.pinned:
            return None
        return self.scores.active(layer, source, self.from_own_input)

    def guess(self, layer: int, source: torch.Tensor) -> torch.Tensor | None:
        """The neurons whose reads start early; None where there are no guesses."""
        if not self.mode.refines or layer in self.mode.pinned:
            return None
        return self.scores.active(layer, source, own=False)


def make_chooser(store: Store, config: Config) -> RingChooser | None:
    """What the ring of this configuration would choose; None: every neuron (kind `all`).

    Raises ConfigError and StoreError as the ring's start does.
    """
    config = resolve(store, config)
    kind = config.predictor.kind
    if kind == "lowrank" and config.predictor.cache_aware:
        raise ConfigError("predictor.cache_aware chooses by what is resident, which only a ring knows")
    pinned = pinned_layers(store, config)
    mode = Mode(
        store.layout.layers, config.predictor.lookahead, bool(config.predictor.refine), pinned, kind == "all"
    )
    if kind == "all":
        return None
    if kind == "oracle":
        return RingChooser(mode, OracleScores(store))
    scorer = lowrank.load(store, config.model.predictor, mode.lookahead, mode.refines, 0.0, pinned)
    early = predicts_early(store, config)
    return RingChooser(mode, LowRankScores(scorer.maps, config.predictor.threshold), early)
