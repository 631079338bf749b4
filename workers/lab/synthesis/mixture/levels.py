"""How the residual stream's energy grows from block to block, part by part, as the planting has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from storage.architecture import Architecture
from storage.errors import UnsupportedModel
from workers.lab.synthesis.mixture.planting import MixturePlanting

CONSTANT = 32  # coordinates; those that are routed follow
GROUP = 32  # values that share a scale: parts are whole groups


@dataclass(frozen=True, slots=True)
class Parts:
    """Which coordinates are which."""

    width: int  # d_model
    routed: int

    @classmethod
    def of(cls, model: Architecture) -> Parts:
        """Raises UnsupportedModel for heads or a model that are too narrow."""
        head = min(layer.attention.head_dim for layer in model.layers)
        parts = cls(model.d_model, 64 if head >= 64 else GROUP)
        if head < parts.routed or model.d_model < 4 * (CONSTANT + parts.routed):
            raise UnsupportedModel("routing cannot be planted in a model so narrow")
        return parts

    @property
    def rest(self) -> int:
        """How many are neither."""
        return self.width - CONSTANT - self.routed

    @property
    def columns(self) -> slice:
        """Those that are routed."""
        return slice(CONSTANT, CONSTANT + self.routed)


@dataclass(frozen=True, slots=True)
class Level:
    """Energies of one token's stream, summed over the coordinates of each part."""

    constant: float
    slow: float  # routed: what attention brought
    own: float  # routed: what belongs to the token
    rest: float

    @property
    def routed(self) -> float:
        return self.slow + self.own

    @property
    def total(self) -> float:
        return self.constant + self.routed + self.rest

    def seen(self, energy: float, width: int) -> float:
        """What a norm leaves of `energy`: of all coordinates together it makes `width`."""
        return width * energy / self.total


def first(planting: MixturePlanting, width: int) -> Level:
    """Of the embeddings."""
    whole = planting.embedding**2 * width
    constant, own = planting.constant_energy * whole, planting.routed_energy * whole
    return Level(constant, 0.0, own, whole - constant - own)


def levels(model: Architecture, planting: MixturePlanting) -> Iterator[tuple[Level, Level]]:
    """Of each layer the stream before its attention and before its FFN."""
    level = first(planting, model.d_model)
    for index in range(len(model.layers)):
        attended = replace(
            level,
            slow=level.slow + brought(level, index, planting),
            rest=level.rest * (1 + planting.attention_energy),
        )
        yield level, attended
        level = replace(
            attended,
            own=attended.own * (1 + planting.turn),
            rest=attended.rest * (1 + planting.ffn_energy),
        )


def brought(level: Level, layer: int, planting: MixturePlanting) -> float:
    """Routed energy that a layer's attention writes."""
    if layer == 1:
        return level.own * (planting.slow + planting.short) / planting.own
    return planting.turn * level.slow
