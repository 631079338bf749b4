"""Looks over the predictors' shoulder: of sampled tokens one layer each, computed whole beside its set.

The audited layer is read from the store a second time, past the slots and past the prefetcher's
counters, and its true active set is made from the very FFN input that the ring used. That takes a
read of the whole layer, so audited runs are slower; `audit_seconds` tells by how much.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import numpy as np
import numpy.typing as npt

from storage.families.architecture import layer as tensor_name
from storage.floats import widen
from storage.format import BUNDLES, CARRIER, Store
from workers.compute.weights import Weights

F32 = npt.NDArray[np.float32]
_BLOCK = 1024  # bundles read at once


class Audit:
    """Of every `every`-th decoded token, one layer in turn. ReLU models only."""

    def __init__(self, store: Store, weights: Weights, every: int) -> None:
        self._layout = store.layout
        self._weights = weights
        self._every = every
        self._path = store.path / BUNDLES
        self._order = store.order()
        self._tokens = 0
        self.layer = -1  # to look at in the token at hand; -1: none

    def next_token(self) -> None:
        """Choose the layer of the next token."""
        number, rest = divmod(self._tokens, self._every)
        self.layer = number % self._layout.layers if rest == 0 else -1
        self._tokens += 1

    def look(
        self, ffn_input: F32, ids: npt.NDArray[np.int32], output: F32, sums: MutableMapping[str, float]
    ) -> None:
        """Compare `layer`'s set and what came out of it with the whole layer.

        `ids` are the neurons that were summed into `output` [d_model]; `sums` grow by counts of
        neurons, by active magnitudes, and by squares of the outputs, per layer; and over all
        layers by the active neurons and those of them that were predicted.
        """
        predicted = np.zeros(self._layout.d_ff, np.bool_)
        predicted[ids] = True
        a, whole = self._compute(ffn_input)
        active = a > 0
        found = {
            "tokens": 1,
            "active": np.count_nonzero(active),
            "missed": np.count_nonzero(active & ~predicted),
            "wrong": np.count_nonzero(predicted & ~active),
            "inactive": np.count_nonzero(~active),
            "magnitude": a.sum(dtype=np.float64),
            "magnitude_missed": a[~predicted].sum(dtype=np.float64),
            "output": np.square(whole, dtype=np.float64).sum(),
            "error": np.square(whole - output, dtype=np.float64).sum(),
        }
        for name, value in found.items():
            sums[f"layer.{self.layer}.audit_{name}"] += float(value)
        sums["audit_active"] += float(found["active"])
        sums["audit_found"] += float(found["active"] - found["missed"])

    def _compute(self, x: F32) -> tuple[F32, F32]:
        """Every activation [d_ff], and the FFN's output [d_model]."""
        layout, layer = self._layout, self.layer
        up_bias = self._weights.vector(tensor_name(layer, "up.bias"))
        down_bias = self._weights.vector(tensor_name(layer, "down.bias"))
        a = np.zeros(layout.d_ff, np.float32)
        output = down_bias.copy() if down_bias.size else np.zeros(layout.d_model, np.float32)
        with self._path.open("rb", buffering=0) as file:
            for start in range(0, layout.d_ff, _BLOCK):
                positions = np.arange(start, min(layout.d_ff, start + _BLOCK))
                ids = positions if self._order is None else self._order[layer, positions]
                up, down = self._read(file.fileno(), layout.offset(layer, start), positions.size)
                pre = up @ x
                if up_bias.size:
                    pre += up_bias[ids]
                a[ids] = np.maximum(pre, 0)
                output += a[ids] @ down
        return a, output

    def _read(self, descriptor: int, offset: int, count: int) -> tuple[F32, F32]:
        """Both rows of `count` bundles, `[count, d_model]` each; they do not stay in the page cache."""
        layout = self._layout
        size = count * layout.stride
        raw = np.frombuffer(os.pread(descriptor, size, offset), np.uint8).reshape(count, layout.stride)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        used = np.ascontiguousarray(raw[:, : layout.rows * layout.row_bytes])
        rows = widen(used.view(CARRIER[layout.dtype]), layout.dtype)
        return rows[:, : layout.d_model], rows[:, layout.d_model : 2 * layout.d_model]
