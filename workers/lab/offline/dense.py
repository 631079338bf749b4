"""The whole model without a ring: for predictor training, evaluation and tests.

Layers are read from the store one at a time, so memory stays at the resident weights, one layer and
the activations. The mathematics is the ring's own (`blocks.py`, `batch.py`); what goes in and out are
torch tensors, which share the arrays' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from storage.format import Store
from workers.compute.batch import BatchFfn, BatchOperations, Workers
from workers.compute.blocks import after_ffn, before_ffn
from workers.compute.weights import Weights

F32 = npt.NDArray[np.float32]
Mask = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class DenseModel:
    """Runs blocks of token sequences of one length, from position 0. Use as a context manager.

    Tensors are float32: x and FFN inputs [sequences, tokens, d_model].
    """

    def __init__(self, store: Store, threads: int) -> None:
        self.store = store
        self.architecture = store.architecture
        self._workers = Workers(threads)
        self._operations = BatchOperations(Weights(store), self._workers)

    def embed(self, tokens: npt.ArrayLike) -> torch.Tensor:
        """The residual stream before layer 0 of token ids [sequences, tokens]."""
        return torch.from_numpy(self._operations.embed(np.asarray(tokens)))

    def layer(
        self,
        index: int,
        x: torch.Tensor,
        mask: Mask | None = None,
        bundles: npt.NDArray[np.generic] | None = None,
        early: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's FFN input and its output.

        `mask(index, announced, ffn_input)` may return [sequences · tokens, d_ff] bool: only those
        neurons are summed, as if a predictor had chosen them from what was `announced`, which is the
        FFN's input unless `early`. `bundles` saves reading the layer again (`Store.read_layer`).
        """
        kept: list[F32] = []
        operations = self._operations
        residual, ffn_input = before_ffn(self.architecture, operations, index, x.numpy(), kept.append, early)
        flat = ffn_input.reshape(-1, ffn_input.shape[-1])
        chosen = None
        if mask is not None:
            chosen = mask(index, torch.from_numpy(kept[0].reshape(flat.shape)), torch.from_numpy(flat))
        ffn = BatchFfn(operations, index, flat, None if chosen is None else chosen.numpy())
        layer = self.store.read_layer(index) if bundles is None else bundles
        ids = np.arange(self.architecture.d_ff, dtype=np.int32)
        ffn.add(ids, ids, layer.reshape(layer.shape[0], -1))
        y = ffn.finish().reshape(ffn_input.shape)
        x = torch.from_numpy(after_ffn(self.architecture, operations, index, residual, y))
        return torch.from_numpy(ffn_input), x

    def layers(self, tokens: npt.ArrayLike, mask: Mask | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Every layer's index and FFN input [sequences, tokens, d_model], in order."""
        x = self.embed(tokens)
        for index in range(self.architecture.layers):
            ffn_input, x = self.layer(index, x, mask)
            yield index, ffn_input

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, vocabulary] from the last layer's output."""
        return torch.from_numpy(self._operations.logits(x.numpy()))

    def forward(self, tokens: npt.ArrayLike, mask: Mask | None = None) -> torch.Tensor:
        """Logits of all tokens, [sequences, tokens, vocabulary]."""
        x = self.embed(tokens)
        for index in range(self.architecture.layers):
            _, x = self.layer(index, x, mask)
        return self.logits(x)

    def close(self) -> None:
        self._workers.close()

    def __enter__(self) -> DenseModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
