"""The decoder without a ring: all bundles at hand, prefill by batch and decoding by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from storage.store import Store
from workers.compute.batch import BatchFfn, BatchOperations, Workers
from workers.compute.blocks import after_ffn, before_ffn
from workers.compute.token import TokenFfn, TokenOperations
from workers.compute.weights import Weights


class LocalDecoder:
    """Close it after use."""

    def __init__(self, store: Store, context: int = 128, threads: int = 1) -> None:
        weights = self.weights = Weights(store)
        self.architecture = store.architecture
        self.token = TokenOperations(weights, context, threads)
        self.workers = Workers(threads)
        self.batch = BatchOperations(weights, self.workers, self._keep)
        self.bundles = [
            store.read_layer(index).reshape(store.layout.d_ff, -1) for index in range(store.layout.layers)
        ]
        self.ids = np.arange(store.layout.d_ff, dtype=np.int32)
        self.length = 0

    def _keep(self, index: int, keys: np.ndarray, values: np.ndarray) -> None:
        tokens = keys.shape[2]
        self.token.cache.keys[index, :, :tokens] = keys[0]
        self.token.cache.values[index, :, :tokens] = values[0]

    def prefill(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of all tokens, [tokens, vocabulary]."""
        x = self.batch.embed(np.array([list(prompt)]))
        for index, bundles in enumerate(self.bundles):
            residual, hidden = before_ffn(self.architecture, self.batch, index, x, lambda _: None)
            ffn = BatchFfn(self.batch, index, hidden[0])
            ffn.add(self.ids, self.ids, bundles)
            x = after_ffn(self.architecture, self.batch, index, residual, ffn.finish()[None])
        self.length = len(prompt)
        return self.batch.logits(x)[0]

    def steps(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of all tokens, [tokens, vocabulary], decoded one by one from an empty cache."""
        self.length = 0
        return np.stack([self.step(token) for token in tokens])

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Logits after one more token."""
        self.token.position = self.length
        x = self.token.embed(token)
        for index, bundles in enumerate(self.bundles):
            residual, hidden = before_ffn(self.architecture, self.token, index, x, lambda _: None)
            ffn = TokenFfn(self.token, index, hidden, bundles, np.stack([self.ids, self.ids]))
            ffn.add(self.ids.size)
            ffn.close()
            x = after_ffn(self.architecture, self.token, index, residual, ffn.output)
        self.length += 1
        return self.token.logits(x)

    def close(self) -> None:
        self.workers.close()

    def __enter__(self) -> LocalDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
