"""Keys and values of the tokens so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from storage.floats import narrow, widen
from storage.format import CARRIER
from workers.compute.weights import aligned

F32 = npt.NDArray[np.float32]


class KeyValueCache:
    """Of every layer: [layers, kv_heads, context, head_dim] each, in `dtype`'s carrier."""

    def __init__(self, layers: int, kv_heads: int, context: int, head_dim: int, dtype: str) -> None:
        self.dtype = dtype
        shape, carrier = (layers, kv_heads, context, head_dim), np.dtype(CARRIER[dtype])
        size = carrier.itemsize * layers * kv_heads * context * head_dim
        # Untouched pages take no memory: the cache grows with the text.
        self.keys = aligned(size).view(carrier).reshape(shape)
        self.values = aligned(size).view(carrier).reshape(shape)

    def put(self, layer: int, position: int, keys: F32, values: F32) -> None:
        """Keep those of the tokens from `position` on, [kv_heads, tokens, head_dim] each, rounded."""
        rows = slice(position, position + keys.shape[1])
        self.keys[layer, :, rows] = narrow(keys, self.dtype)
        self.values[layer, :, rows] = narrow(values, self.dtype)

    def past(self, layer: int, tokens: int) -> tuple[F32, F32]:
        """Copies of the first `tokens`' keys and values, [kv_heads, tokens, head_dim] float32."""
        keys, values = self.keys[layer, :, :tokens], self.values[layer, :, :tokens]
        return widen(keys, self.dtype), widen(values, self.dtype)
