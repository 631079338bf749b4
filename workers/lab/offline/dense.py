"""The whole model without a ring: for predictor training, evaluation and tests.

Layers are read from the store one at a time, so memory stays at the resident weights, one layer and
the activations. The loop is the ring's own (`compute/blocks.py`), the arithmetic torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.store import Store
from workers.compute.blocks import run, run_layer
from workers.compute.torch.device import TorchDevice
from workers.compute.weights import Weights
from workers.routing import Ids

Bytes = npt.NDArray[np.uint8]

# Of a layer, what was announced and the FFN's input, [sequences · tokens, d_model]: which neurons are
# summed for each row, [sequences · tokens, neurons]; None: all of them.
Mask = Callable[[int, Tensor, Tensor], Tensor | None]
# Of a layer, the FFN's input and the neurons that are summed: what the others add, shaped as the input.
Rest = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class _Whole:
    """Every unit of a layer: `blocks.Units`, from the store or from memory."""

    store: Store
    device: TorchDevice
    mask: Mask | None
    memory: Bytes | None  # [units, stride]; None: read from the store
    rest: Rest | None = None
    announced: Tensor | None = None
    ffn_input: Tensor | None = None

    def announce(self, index: int, hidden: Tensor) -> None:
        self.announced = hidden

    def routed(self, index: int, ids: Ids) -> None:
        """Every unit is at hand."""

    def ffn(self, index: int, ffn_input: Tensor) -> Tensor:
        self.ffn_input = ffn_input
        assert self.announced is not None
        chosen = None if self.mask is None else self.mask(index, self.announced, ffn_input)
        ffn = self.device.ffn(index, ffn_input, None if chosen is None else chosen.numpy())
        memory = self.store.read_layer(index) if self.memory is None else self.memory
        ids = np.arange(memory.shape[0], dtype=np.int32)
        ffn.add(ids, ids, memory)
        ffn.close()
        if self.rest is None or chosen is None:
            return ffn.finish()
        return ffn.finish() + self.rest(index, ffn_input, chosen)


class DenseModel:
    """Runs blocks of token sequences of one length, from position 0. Use as a context manager.

    Tensors are float32: x and FFN inputs [sequences, tokens, d_model].
    """

    def __init__(self, store: Store, threads: int) -> None:
        """`threads` are torch's, for the process."""
        torch.set_num_threads(threads)
        self.store = store
        self.architecture = store.architecture
        self._device = TorchDevice(Weights(store))

    def embed(self, tokens: npt.ArrayLike) -> Tensor:
        """The residual stream before layer 0 of token ids [sequences, tokens]."""
        ids = np.asarray(tokens)
        self._device.begin(0, ids.shape[1], every=True, sequences=ids.shape[0])
        return self._device.embed(ids.reshape(-1)).view(*ids.shape, -1)

    def layer(
        self,
        index: int,
        x: Tensor,
        mask: Mask | None = None,
        units: Bytes | None = None,
        early: bool = False,
        rest: Rest | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer's FFN input and its output.

        Only the neurons of a `mask` are summed, as if a predictor had chosen them from what was announced:
        the FFN's input unless `early`. `units` saves reading the layer again (`Store.read_layer`).
        `rest` is what its other neurons add all the same.
        """
        self._device.begin(0, x.shape[1], every=True, sequences=x.shape[0])
        whole = _Whole(self.store, self._device, mask, units, rest)
        layer = self.architecture.layers[index]
        output = run_layer(layer, self._device, index, x.flatten(0, 1), whole, early)
        assert whole.ffn_input is not None
        return whole.ffn_input.view(x.shape), output.view(x.shape)

    def layers(self, tokens: npt.ArrayLike, mask: Mask | None = None) -> Iterator[tuple[int, Tensor]]:
        """Every layer's index and FFN input [sequences, tokens, d_model], in order."""
        x = self.embed(tokens)
        for index in range(len(self.architecture.layers)):
            ffn_input, x = self.layer(index, x, mask)
            yield index, ffn_input

    def logits(self, x: Tensor) -> Tensor:
        """[sequences, tokens, vocabulary] from the last layer's output."""
        return torch.from_numpy(self._device.logits(x.flatten(0, 1))).view(*x.shape[:2], -1)

    def forward(self, tokens: npt.ArrayLike, mask: Mask | None = None) -> Tensor:
        """Logits of all tokens, [sequences, tokens, vocabulary]."""
        x = self.embed(tokens)
        whole = _Whole(self.store, self._device, mask, None)
        return self.logits(run(self.architecture, self._device, x.flatten(0, 1), whole).view(x.shape))

    def close(self) -> None:
        self._device.close()

    def __enter__(self) -> DenseModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
