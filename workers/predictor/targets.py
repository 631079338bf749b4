"""What is predicted when: the table of PROTOCOL.md."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ring.messages import EMBEDDING
from pipeline.ring.plan import Forecast, Plan


@dataclass(frozen=True, slots=True)
class Target:
    """One prediction to send for a source."""

    layer: int
    guess: bool
    every: bool  # every neuron is wanted, whatever a score says


def targets(forecast: Forecast, layers: int, source: int, every: bool) -> list[Target]:
    """Predictions to send on `source`, a layer or EMBEDDING, in this order; `every`: as of the step."""
    if every:
        lookahead = max(1, forecast.lookahead)
        return [Target(layer, guess=False, every=True) for layer in _ahead(layers, source, lookahead)]
    ahead = _ahead(layers, source, forecast.lookahead)
    if not forecast.refines:
        return [_target(forecast, layer, guess=False) for layer in ahead]
    own = [] if source == EMBEDDING else [_target(forecast, source, guess=False)]
    return [*own, *(_target(forecast, layer, guess=True) for layer in ahead)]


def targets_of_choice(plan: Plan, source: int, chosen: int, asked: bool) -> list[Target]:
    """The same for a mixture's prompt that has chosen so many of the source's experts.

    `asked`: the source's set has been sent already, ahead.
    """
    if source == EMBEDDING:
        return []
    own = [] if asked else [Target(source, guess=False, every=not plan.wants_chosen(source))]
    following = [Target(source + 1, guess=False, every=True)] if plan.asks_ahead(source, chosen) else []
    return own + following


def _ahead(layers: int, source: int, lookahead: int) -> list[int]:
    """The layers that are predicted `lookahead` layers ahead from `source`."""
    if source == EMBEDDING:
        return list(range(min(lookahead, layers)))
    return [source + lookahead] if source + lookahead < layers else []


def _target(forecast: Forecast, layer: int, guess: bool) -> Target:
    return Target(layer, guess, every=forecast.every or layer in forecast.pinned)
