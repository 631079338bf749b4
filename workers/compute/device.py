"""What can compute a model: one layer's parts, over arrays that are the device's own business.

`blocks.py` composes a layer from these. Hidden states are [rows, d_model], a row for each token of the step;
between `begin` and the next `begin`, all calls belong to one step.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from storage.architecture import NormPlace
from storage.codecs import F32
from workers.routing import Ids

Hidden = TypeVar("Hidden", bound=Any)
Out_co = TypeVar("Out_co", bound=Any, covariant=True)
I32 = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class LayerFfn(Protocol[Out_co]):
    """One layer's FFN over the units that are given to it, in parts.

    The output depends on the units alone: not on parts, their order or where they lay.
    """

    # So far, of a step that wants a set: neurons with an activation that is not zero, or experts. Where the
    # device counts neurons itself (`Device.counters`) it stays 0.
    active: int

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        """Add units `ids`, which lie in `slots` of `memory` [slots, stride]. Both are [n]."""

    def close(self) -> None:
        """End a group of parts: groups ascend, and their slots are free again afterwards."""

    def finish(self) -> Out_co:
        """The FFN's output [rows, d_model], after the last group."""


@runtime_checkable
class ApartFfn(LayerFfn[Out_co], Protocol[Out_co]):
    """One that keeps its units' outputs apart until the group is closed: it can be told of one too many."""

    def forget(self, ids: I32) -> None:
        """These units, which were added to the open group, shall not count."""


class Device(Protocol[Hidden]):
    """Computes one step after the other. Keys and values stay with it, from step to step."""

    rows: int  # tokens that may have one set; each has the bits that it would have alone

    def begin(self, first: int, count: int, every: bool, sequences: int = 1) -> None:
        """Begin a step of `count` tokens of each sequence, the first at position `first`.

        `every`: all units are wanted, in each row; otherwise they are a predicted set, and `count` is
        at most `rows`.
        """

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> Hidden:
        """The residual stream before layer 0, of token ids [rows]."""

    def norm(self, index: int, place: NormPlace, x: Hidden) -> Hidden:
        """The norm that layer `index` has at `place`."""

    def attention(self, index: int, x: Hidden) -> Hidden:
        """Layer `index`'s attention with its projections, keeping keys and values."""

    def onward(self, index: int, x: Hidden) -> tuple[Hidden, Hidden]:
        """The residual stream behind layer `index`'s attention, and the FFN's input, from that before it.

        Of layers that are `plain`; `blocks.onward`, if the device has no better way.
        """

    def route(self, index: int, x: Hidden) -> Ids:
        """Choose each row's experts, with weights, for layer `index`'s FFN; x is what its router reads.

        Returns them, [rows, top_k].
        """

    def settle(self, index: int, ids: Ids) -> None:
        """The rows of the last `route` have these experts instead, [rows, n], ascending in each."""

    def ffn(self, index: int, x: Hidden, mask: Mask | None = None) -> LayerFfn[Hidden]:
        """Begin layer `index`'s FFN; `mask` [rows, neurons], where given, silences neurons.

        Of a layer with experts, each row has those that `route` chose, and no others.
        """

    def logits(self, x: Hidden) -> F32:
        """[rows, vocabulary] from the last layer's output."""

    def host(self, x: Hidden) -> F32:
        """A hidden state where other processes can have it."""

    def counters(self) -> dict[str, float]:
        """Totals since the start, for any thread: what the device alone knows of itself."""

    def close(self) -> None:
        """Give threads and memory back."""
