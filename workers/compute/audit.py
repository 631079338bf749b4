"""Looks over the predictors' shoulder: of sampled tokens one layer each, computed whole beside its set.

The audited layer is read from the store a second time, past the slots and past the prefetcher's
counters, and its true active set is made from the very FFN input that the ring used. That takes a
read of the whole layer, so audited runs are slower; `audit_seconds` tells by how much.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ring.audit import ACTIVE, FOUND, AuditSums
from storage.architecture import layer as tensor_name
from storage.codecs import F32
from storage.files import drop_cache
from storage.layout import Role
from storage.manifest import BUNDLES
from storage.store import Store
from workers.compute.bound import Source

_BLOCK = 1024  # bundles read at once


class Audit:
    """Of every `every`-th decoded token, one layer in turn. ReLU models only."""

    def __init__(self, store: Store, weights: Source, every: int) -> None:
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
        self.layer = number % len(self._layout.layers) if rest == 0 else -1
        self._tokens += 1

    def look(
        self, ffn_input: F32, ids: npt.NDArray[np.int32], output: F32, sums: MutableMapping[str, float]
    ) -> None:
        """Compare `layer`'s set and what came out of it with the whole layer.

        `ids` are the neurons that were summed into `output` [d_model]; `sums` grow by counts of
        neurons, by active magnitudes, and by squares of the outputs, per layer; and over all
        layers by the active neurons and those of them that were predicted.
        """
        predicted = np.zeros(self._layout.layers[self.layer].units, np.bool_)
        predicted[ids] = True
        a, whole = self._compute(ffn_input)
        active = a != 0
        found = AuditSums(
            tokens=1.0,
            active=float(np.count_nonzero(active)),
            missed=float(np.count_nonzero(active & ~predicted)),
            wrong=float(np.count_nonzero(predicted & ~active)),
            inactive=float(np.count_nonzero(~active)),
            magnitude=float(np.abs(a).sum(dtype=np.float64)),
            magnitude_missed=float(np.abs(a[~predicted]).sum(dtype=np.float64)),
            output=float(np.square(whole, dtype=np.float64).sum()),
            error=float(np.square(whole - output, dtype=np.float64).sum()),
        )
        for name, value in found.by_counter(self.layer):
            sums[name] += value
        sums[ACTIVE] += found.active
        sums[FOUND] += found.active - found.missed

    def _compute(self, x: F32) -> tuple[F32, F32]:
        """Every activation [neurons], and the FFN's output [d_model]."""
        layer, part = self.layer, self._layout.layers[self.layer]
        down_bias = self._weights.vector(tensor_name(layer, "down.bias"))
        a = np.zeros(part.units, np.float32)
        output = down_bias.copy() if down_bias.size else np.zeros(part.unit.d_model, np.float32)
        with self._path.open("rb", buffering=0) as file:
            for start in range(0, part.units, _BLOCK):
                positions = np.arange(start, min(part.units, start + _BLOCK))
                ids = positions if self._order is None else self._order[layer][positions]
                units = self._read(file.fileno(), start, positions.size)
                a[ids] = self._activations(units, ids, x)
                output += a[ids] @ part.unit.view(units, "down").widened()
        return a, output

    def _activations(self, units: npt.NDArray[np.uint8], ids: npt.NDArray[Any], x: F32) -> F32:
        """Of some units [n, stride], whose ids are `ids` [n]."""
        ffn = self._weights.architecture.layers[self.layer].ffn

        def product(role: Role) -> F32:
            rows = self._layout.layers[self.layer].unit.view(units, role)
            bias = self._weights.vector(tensor_name(self.layer, f"{role}.bias"))
            found: F32 = rows.widened() @ x
            return found + bias[ids] if bias.size else found

        first = product(ffn.deciding[0])
        a = np.where(first > np.float32(ffn.threshold), first, np.float32(0))
        if ffn.kind == "gated":
            up = product("up")
            a *= np.maximum(up, 0) if ffn.up_activation == "relu" else up
        return a

    def _read(self, descriptor: int, position: int, count: int) -> npt.NDArray[np.uint8]:
        """`count` units, [count, stride]; they do not stay in the page cache."""
        part = self._layout.layers[self.layer]
        offset, size = part.offset(position), count * part.unit.stride
        units = np.frombuffer(os.pread(descriptor, size, offset), np.uint8).reshape(count, -1)
        drop_cache(descriptor, offset, size)
        return units
