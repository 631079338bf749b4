"""What is predicted when: the table of PROTOCOL.md."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ring.messages import EMBEDDING


@dataclass(frozen=True, slots=True)
class Target:
    """One prediction to send for a source."""

    layer: int
    guess: bool
    every: bool  # every neuron is wanted, whatever a score says


@dataclass(frozen=True, slots=True)
class Mode:
    """What decides the targets besides the source. `every`: kind `all`."""

    layers: int
    lookahead: int
    refine: bool
    pinned: frozenset[int] = frozenset()
    every: bool = False

    @property
    def refines(self) -> bool:
        """Whether sets wait for the layer's own input; the set of kind `all` does not depend on it."""
        return self.refine and not self.every and self.lookahead > 0


def targets(mode: Mode, source: int, stream: bool) -> list[Target]:
    """Predictions to send on `source`, a layer or EMBEDDING, in this order."""
    if stream:
        return [
            Target(layer, guess=False, every=True) for layer in _ahead(mode, source, max(1, mode.lookahead))
        ]
    ahead = _ahead(mode, source, mode.lookahead)
    if not mode.refines:
        return [_target(mode, layer, guess=False) for layer in ahead]
    own = [] if source == EMBEDDING else [_target(mode, source, guess=False)]
    return [*own, *(_target(mode, layer, guess=True) for layer in ahead)]


def _ahead(mode: Mode, source: int, lookahead: int) -> list[int]:
    """The layers that are predicted `lookahead` layers ahead from `source`."""
    if source == EMBEDDING:
        return list(range(min(lookahead, mode.layers)))
    return [source + lookahead] if source + lookahead < mode.layers else []


def _target(mode: Mode, layer: int, guess: bool) -> Target:
    return Target(layer, guess, every=mode.every or layer in mode.pinned)
