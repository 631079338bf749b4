"""What compute asks of a shadow: the FFN in few bits, and which units' full rows a token deserves.

Of a token's layer, `choose` comes first, as soon as there is an FFN input; then maybe `settle`; then `rest`,
while the full rows are read; then maybe `foresee` of the next layer (`look_ahead.py`). The chosen units' full
rows are added by `Device.ffn` as ever, so the layer's output is that of the chosen units in full, plus the
rest in few bits. It depends on the set alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from workers.routing import Ids

Hidden = TypeVar("Hidden", bound=Any)


@dataclass(frozen=True, slots=True)
class Choice:
    """Units whose full rows are wanted, both ascending."""

    certain: Ids
    doubtful: Ids  # wanted only where they are resident


class Shadow(Protocol[Hidden]):
    """The low-bit copy of a model's FFNs, over a device's hidden states."""

    def choose(self, index: int, x: Hidden) -> Choice:
        """Which units of layer `index` deserve their full rows; x is a token's FFN input, [1, d_model]."""

    def settle(self, ids: Ids) -> None:
        """The units of the last choice that have their full rows are these; else the certain ones have."""

    def rest(self) -> Hidden:
        """What the other units of the last choice's layer add, [1, d_model], without the layer's bias."""

    def foresees(self, index: int) -> bool:
        """Whether the layer before can tell what layer `index` will want, earlier than that does itself."""

    def foresee(self, index: int, x: Hidden) -> Ids:
        """Units that layer `index` will probably want in full, ascending; x is the FFN input before it."""

    def ffn(self, index: int, x: Hidden, every: bool) -> Hidden:
        """The whole FFN in few bits, of x [rows, d_model]; `every` as of the step."""

    def close(self) -> None:
        """Give threads and memory back."""
