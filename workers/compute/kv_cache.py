"""Keys and values of the tokens so far. Every step puts its own and reads those before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage.architecture import Attention
from storage.codecs import F32, Carrier, Codec
from workers.compute.weights import aligned


class KeyValueCache:
    """Of every layer: [kv_heads, context, head_dim] each, in the carrier of one codec."""

    def __init__(self, layers: Sequence[Attention], context: int, codec: Codec) -> None:
        self.codec = codec
        # Untouched pages take no memory: the cache grows with the text.
        self.keys = [_empty(layer, context, codec) for layer in layers]
        self.values = [_empty(layer, context, codec) for layer in layers]

    def put(self, layer: int, position: int, keys: F32, values: F32) -> None:
        """Keep those of the tokens from `position` on, [kv_heads, tokens, head_dim] each, rounded."""
        rows = slice(position, position + keys.shape[1])
        self.keys[layer][:, rows] = self.codec.narrow(keys)
        self.values[layer][:, rows] = self.codec.narrow(values)

    def past(self, layer: int, tokens: int) -> tuple[F32, F32]:
        """Copies of the first `tokens`' keys and values, [kv_heads, tokens, head_dim] float32."""
        keys, values = self.keys[layer][:, :tokens], self.values[layer][:, :tokens]
        return self.codec.widen(keys), self.codec.widen(values)


def _empty(layer: Attention, context: int, codec: Codec) -> Carrier:
    shape = (layer.kv_heads, context, layer.head_dim)
    return aligned(codec.size(int(np.prod(shape)))).view(codec.carrier).reshape(shape)
