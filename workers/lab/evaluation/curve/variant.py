"""Who gets true rows, and what the others get: one point of a curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from storage.dial import Others

# What a neuron's score is made from: its true activation, or that of a low-bit copy of its rows, computed
# from the FFN's own input, from the layer's input without its attention, or from the layer before.
Scored: TypeAlias = Literal["true", "own", "early", "previous"]
Reads: TypeAlias = Literal["all", "down"]  # true rows of a chosen neuron


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute every FFN.

    Chosen are either the best of each token by score, `share` of them, or those above the layer's threshold.
    """

    name: str
    share: float | None = None  # 1: all; 0: none
    thresholds: tuple[float, ...] | None = None  # of each layer; where `share` is None
    scored: Scored = "true"
    centred: bool = False  # scores are of the distance to the neuron's centre
    others: Others = "nothing"
    reads: Reads = "all"
    copy: str | None = None  # whose low-bit rows are used, where any are
    only: int | None = None  # the one layer that it touches; None: every one

    def __post_init__(self) -> None:
        assert (self.share is None) != (self.thresholds is None), self.name
        assert self.copy is not None or not self.needs_copy, self.name

    @property
    def needs_copy(self) -> bool:
        return self.scored != "true" or self.others == "low" or self.reads == "down"

    def touches(self, layer: int) -> bool:
        return self.only is None or self.only == layer


DENSE = Variant("exact", share=1.0)


def plain(copy: str, name: str = "") -> Variant:
    """The low-bit rows for all neurons: a model of so many bits."""
    return Variant(name or f"all {copy}", share=0.0, others="low", copy=copy)
