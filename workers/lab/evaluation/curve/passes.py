"""A text through several variants of a model at once, layer by layer.

Each layer is read, and its copies are rounded, once for all variants. Every token has its own chosen neurons,
as in decoding; only a sequence's first token has all of them, since that is what a ring must prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.console import size
from storage.architecture import Layer, NormPlace
from storage.errors import BudgetError, UsageError
from storage.manifest import RESIDENT
from storage.store import Store
from workers.compute.blocks import after_ffn, before_ffn
from workers.compute.bound import BoundModel
from workers.compute.torch.device import TorchDevice
from workers.compute.weights import Weights
from workers.lab.evaluation.curve.journal import Stage
from workers.lab.evaluation.curve.layer import Inputs, LayerFfn
from workers.lab.evaluation.curve.variant import Variant

_KEPT = 6 << 30  # bytes of widened rows that stay in memory from one pass to the next
_VALUES = 1 << 24  # activations of a layer that exist at once, in each of several tables
_OWN = 3 << 29  # bytes: the program, torch, residual streams, and those tables
Progress = Callable[[str, int, int], None]
# Gets a layer's index, the variant, the layer, its inputs, and the neurons chosen for each row [n, neurons].
See = Callable[[int, Variant, LayerFfn, Inputs, Tensor], None]


@dataclass(slots=True)
class _State:
    """One variant's residual stream between two layers, [n, d_model]."""

    x: Tensor
    before: Tensor | None = None  # as the last layer's FFN had it


class Passes:
    """A store's model for any number of passes, which are all of one thread count."""

    def __init__(self, store: Store, copies: Iterable[str], threads: int, budget: int | None = None) -> None:
        """`copies`: names of formats (`copies.Copy`); `budget`: of memory, in bytes.

        Raises UsageError for a mixture of experts, BudgetError where one layer at a time is too much.
        """
        if any(layer.ffn.mixed for layer in store.architecture.layers):
            raise UsageError(
                f"{store.manifest.name} has experts, which its routers choose: a curve is of single neurons"
            )
        torch.set_num_threads(threads)
        self.store = store
        self.copies = tuple(dict.fromkeys(copies))
        self._keeps = self._fitting(budget)
        weights = Weights(store)
        self._bound = BoundModel.of(weights)
        self._device = TorchDevice(weights)
        self._loaded: dict[int, LayerFfn] = {}

    def _fitting(self, budget: int | None) -> bool:
        """Whether all layers may stay in memory. Raises BudgetError where not even one may be there."""
        architecture, kinds = self.store.architecture, 1 + len(self.copies)
        neurons = [layer.ffn.neurons for layer in architecture.layers]
        rows = 3 if architecture.layers[0].ffn.kind == "gated" else 2
        widened = 4 * rows * architecture.d_model * kinds
        if budget is None:
            return widened * sum(neurons) <= _KEPT
        room = budget - _OWN - self.store.manifest.files[RESIDENT].bytes
        one = (widened + 2 * rows * architecture.d_model) * max(neurons)  # and as it is read
        if one > room:
            raise BudgetError(
                f"measuring {self.store.manifest.name} takes {size(budget - room + one)}, "
                f"and the budget is {size(budget)}"
            )
        return widened * sum(neurons) <= min(_KEPT, room)

    def layer(self, index: int) -> LayerFfn:
        found = self._loaded.get(index)
        if found is None:
            found = LayerFfn.load(self.store, index, self._bound.layers[index], self.copies)
            if self._keeps:
                self._loaded[index] = found
        return found

    def run(
        self,
        tokens: npt.NDArray[np.int64],
        variants: Sequence[Variant],
        centres: Sequence[Tensor] | None = None,
        see: See | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        stage: Stage | None = None,
        first_alike: Tensor | None = None,
    ) -> list[Tensor]:
        """The last layer's output of every variant, [sequences, tokens, d_model], of equally long sequences.

        The first variant must touch every layer: it is what the others are until the one layer that they
        touch. `centres` [neurons] of each layer; None: zeros. `see` is told of every FFN, but for those that
        `stage` has kept from an earlier run. `first_alike` [sequences · tokens]: of each token the first one
        with the same text so far, which has the same FFN's output; None: they are all different.
        """
        device, layers = self._device, self.store.architecture.layers
        assert variants[0].only is None
        device.begin(0, tokens.shape[1], every=True, sequences=tokens.shape[0])
        start = device.embed(tokens.reshape(-1))
        states = {0: _State(start)} | {
            number: _State(start) for number, one in enumerate(variants) if one.only in (None, 0)
        }
        whole = torch.zeros(tokens.shape, dtype=torch.bool)
        whole[:, 0] = True
        alike = None if first_alike is None else torch.unique(first_alike, return_inverse=True)
        whole = whole.flatten() if alike is None else whole.flatten()[alike[0]]
        stage = stage or Stage()
        first, kept = stage.resume(self._about(tokens, variants))
        states |= {number: _State(*one) for number, one in kept.items()}
        for index, layer in list(enumerate(layers))[first:]:
            ffn = self.layer(index)
            centre = torch.zeros(ffn.norm.shape) if centres is None else centres[index]
            for number, one in enumerate(variants):
                if one.only == index:
                    states[number] = _State(states[0].x, states[0].before)
            for number in sorted(states, reverse=True):  # the first at last: others begin with its state
                one = variants[number] if variants[number].touches(index) else variants[0]
                residual, inputs = self._before(index, layer, states[number])
                if alike is not None:
                    inputs = inputs.some(alike[0])
                output, chosen = _output(ffn, one, index, inputs, centre, whole)
                if alike is not None:
                    output = output[alike[1]]
                if see is not None:
                    see(index, variants[number], ffn, inputs, chosen)
                states[number] = _State(after_ffn(layer, device, index, residual, output), residual)
            streams = {number: (one.x, one.before) for number, one in states.items()}
            stage.keep(index + 1, streams, last=index + 1 == len(layers))
            progress(index + 1, len(layers))
        return [states[number].x.view(*tokens.shape, -1) for number in range(len(variants))]

    def _about(self, tokens: npt.NDArray[np.int64], variants: Sequence[Variant]) -> str:
        """What decides the streams of a pass."""
        return f"{self.store.identity} {tokens.tolist()} {list(variants)} {self.copies}"

    def logits(self, x: Tensor) -> Tensor:
        """[n, vocabulary] from the last layer's output [n, d_model]."""
        return torch.from_numpy(self._device.logits(x))

    def _before(self, index: int, layer: Layer, state: _State) -> tuple[Tensor, Inputs]:
        """The residual stream that the FFN's output is added to, and what scores may be made from."""
        announced: list[Tensor] = []
        residual, own = before_ffn(layer, self._device, index, state.x, announced.append, early=True)
        (early,) = announced
        if state.before is None:
            return residual, Inputs(own, early, early)
        place: NormPlace = (
            "attention_input" if "ffn_input" not in layer.norms and layer.parallel else "ffn_input"
        )
        before = state.before
        previous = self._device.norm(index, place, before) if place in layer.norms else before
        return residual, Inputs(own, early, previous)


def _output(
    ffn: LayerFfn, variant: Variant, index: int, inputs: Inputs, centre: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """`LayerFfn.output`, of not too many rows at a time."""
    step = max(1, _VALUES // ffn.norm.numel())
    if step >= len(whole):
        return ffn.output(variant, index, inputs, centre, whole)
    blocks = [slice(start, start + step) for start in range(0, len(whole), step)]
    found = [ffn.output(variant, index, inputs.some(one), centre, whole[one]) for one in blocks]
    return torch.cat([output for output, _ in found]), torch.cat([chosen for _, chosen in found])
