"""A text through the whole model, dense or as the ring's predictors would have it, layer by layer.

Each token's FFN is restricted to the neurons that the predictors choose for that token, exactly as the ring
restricts it in decode. A dense prefill would hide the predictors' errors. Only a sequence's first token has
all its neurons: it is what a ring must prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.ring.messages import EMBEDDING
from workers.lab.offline.chooser import RingChooser, positive
from workers.lab.offline.dense import Bytes, DenseModel

PREFILLED = 1  # tokens of every sequence that have all their neurons


@dataclass(frozen=True, slots=True)
class Sets:
    """One layer's neurons for a block's tokens, `[n, neurons]` bool."""

    active: Tensor
    predicted: Tensor | None  # None: all were computed
    guessed: Tensor | None


def forward(
    model: DenseModel,
    tokens: npt.NDArray[np.int64],
    chooser: RingChooser | None,
    see: Callable[[int, Sets], None] | None = None,
) -> Tensor:
    """The last layer's output `[sequences, tokens, d_model]` of `tokens` `[sequences, tokens]`.

    `see` gets every layer's sets. Each layer is read from the store once.
    """
    x = model.embed(tokens)
    states = {EMBEDDING: x.flatten(0, 1)}  # what was announced, as far back as a prediction looks
    keep = 0 if chooser is None else chooser.forecast.lookahead
    for index in range(len(model.architecture.layers)):
        units = model.store.read_layer(index)

        def mask(layer: int, announced: Tensor, ffn_input: Tensor, units: Bytes = units) -> Tensor | None:
            states[layer] = announced
            guessed = chosen = None
            if chooser is not None:
                if see is not None:
                    guessed = chooser.guess(layer, states[chooser.guess_source(layer)])
                chosen = chooser.choose(layer, states[chooser.sources(layer)], guessed)
            if see is not None:
                active = positive(model.store.deciding(layer, units), ffn_input)
                see(layer, Sets(active, chosen, guessed))
            if chosen is None or (chooser is not None and not chooser.prefills):
                return chosen
            return _with_first(chosen, tokens.shape)

        rest = None if chooser is None else chooser.rest
        _, x = model.layer(index, x, mask, units, chooser is not None and chooser.early, rest)
        states.pop(index - keep, None)
    return x


def _with_first(chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sets of `[sequences · tokens, neurons]`, every neuron for the tokens that a ring prefills."""
    applied = chosen.clone()
    applied.view(*shape, -1)[:, :PREFILLED] = True
    return applied
