"""One token's operations on the CPU: numba kernels over weights in their own dtype."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.ring.segments import ID, SLOT
from storage.families.architecture import (
    EMBED,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    PROJECT_IN,
    PROJECT_OUT,
    layer,
)
from storage.floats import widen
from workers import kernels
from workers.compute import positions
from workers.compute.kv_cache import KeyValueCache
from workers.compute.weights import Weights

F32 = npt.NDArray[np.float32]


class TokenOperations:
    """`blocks.Operations` for the token at `position`; its keys and values go into the cache."""

    def __init__(self, weights: Weights, context: int, threads: int, cache_dtype: str = "float32") -> None:
        architecture = weights.architecture
        self.architecture = architecture
        self.weights = weights
        self.threads = threads
        self.position = 0
        self.cache = KeyValueCache(
            architecture.layers, architecture.kv_heads, context, architecture.head_dim, cache_dtype
        )
        self.activations = np.empty(architecture.d_ff, np.float32)  # of one layer at a time
        self._scores = np.empty((architecture.heads, context), np.float32)
        self._bias = np.zeros((0, 0), np.float32)
        self._cos = self._sin = np.zeros((context, 0), np.float32)
        if architecture.positions == "alibi":
            self._bias = positions.alibi(architecture.heads, architecture.head_dim, context)
        elif architecture.positions == "rotary":
            self._cos, self._sin = positions.rotary(architecture.rotary_base, architecture.head_dim, context)

    def embed(self, token: int) -> F32:
        """The residual stream of `token` before layer 0, [d_model]."""
        x = widen(self.weights.matrix(EMBED)[token], self.weights.dtype)
        if self.weights.has(PROJECT_IN):
            x = self._linear("project_in", x)
        if self.architecture.positions == "learned":
            row = self.position + self.architecture.position_offset
            x = x + widen(self.weights.matrix(POSITIONS)[row], self.weights.dtype)
        return x

    def norm(self, name: str, x: F32) -> F32:
        weight, bias = self.weights.vector(f"{name}.weight"), self.weights.vector(f"{name}.bias")
        return kernels.layer_norm(x, weight, bias, self.architecture.norm_epsilon)

    def attention(self, index: int, x: F32) -> F32:
        mixed = kernels.attend(
            self._linear(layer(index, "qkv"), x),
            self._cos[self.position],
            self._sin[self.position],
            self.cache.keys[index],
            self.cache.values[index],
            self.position,
            self._bias,
            self._scores,
            self.cache.dtype,
            self.threads,
        )
        return self._linear(layer(index, "out"), mixed)

    def logits(self, x: F32) -> F32:
        """[vocabulary] from the last layer's output [d_model]."""
        if self.architecture.final_norm:
            x = self.norm(FINAL_NORM, x)
        if self.weights.has(PROJECT_OUT):
            x = self._linear("project_out", x)
        return self._product(EMBED if self.architecture.tied_head else HEAD, x)

    def _linear(self, name: str, x: F32) -> F32:
        return self._product(f"{name}.weight", x, self.weights.vector(f"{name}.bias"))

    def _product(self, name: str, x: F32, bias: F32 = kernels.NO_BIAS) -> F32:
        return kernels.matvec(self.weights.matrix(name), x, self.weights.dtype, self.threads, bias)


class TokenFfn:
    """One layer's FFN of one token, over segments of parts that may arrive one by one.

    The sum runs over ascending neuron ids, whatever the parts were.
    """

    def __init__(
        self,
        operations: TokenOperations,
        index: int,
        ffn_input: F32,
        bundles: npt.NDArray[np.generic],
        table: npt.NDArray[np.int32],
    ) -> None:
        """`bundles` [slots, stride in elements]; `table` [2, d_ff]: neurons and slots, part behind part."""
        self._input = ffn_input
        self._bundles = bundles
        self._ids, self._slots = table[ID], table[SLOT]
        self._activations = operations.activations
        self._function = operations.architecture.activation
        self._dtype = operations.weights.dtype
        self._threads = operations.threads
        self._up_bias = operations.weights.vector(layer(index, "up.bias"))
        down_bias = operations.weights.vector(layer(index, "down.bias"))
        self.output = down_bias.copy() if down_bias.size else np.zeros_like(ffn_input)
        self._summed = self._activated = 0  # neurons of the table
        self.active = 0  # neurons so far whose activation is not zero

    def add(self, count: int) -> None:
        """Compute the activations of the table's next `count` neurons: a part."""
        part = slice(self._activated, self._activated + count)
        self._activated += count
        if count:
            kernels.activate(
                self._bundles,
                self._ids[part],
                self._slots[part],
                self._input,
                self._up_bias,
                self._dtype,
                self._function,
                self._threads,
                self._activations[part],
            )

    def close(self) -> None:
        """Sum the segment: the parts since the last `close`."""
        segment = slice(self._summed, self._activated)
        self._summed = self._activated
        if segment.stop > segment.start:
            self.active += kernels.accumulate(
                self._bundles,
                self._ids[segment],
                self._slots[segment],
                self._activations[segment],
                self.output,
                self._dtype,
                self._threads,
            )
