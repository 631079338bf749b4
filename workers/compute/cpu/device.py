"""The CPU as a `Device`: one way for one token and a predicted set, one for many tokens and every unit.

A few tokens with one set go the way of one token, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ring.plan import STEP_ROWS
from storage.architecture import NormPlace
from storage.codecs import F32, FLOAT32, Codec
from workers.compute.bound import BoundModel, Source
from workers.compute.cpu.batch import BatchOperations
from workers.compute.cpu.pool import Pool
from workers.compute.cpu.rows import RowsOperations
from workers.compute.cpu.token import TokenOperations
from workers.compute.device import LayerFfn, Mask
from workers.compute.kv_cache import KeyValueCache
from workers.compute.positions import Positions
from workers.routing import Ids


class CpuDevice:
    """`device.Device` over numpy arrays. Results do not depend on the number of threads."""

    rows = STEP_ROWS

    def __init__(
        self,
        source: Source,
        context: int,
        threads: int,
        cache_codec: Codec = FLOAT32,
        token: Callable[..., TokenOperations] = TokenOperations,
    ) -> None:
        """`context` in tokens; keys and values are kept in `cache_codec`. `token` computes one token."""
        layers = [layer.attention for layer in source.architecture.layers]
        self._pool = Pool(threads)
        model = BoundModel.of(source)
        positions = Positions(layers, context)
        self.cache = KeyValueCache(layers, context, cache_codec)
        self._token = token(source, model, positions, self.cache, threads)
        self._batch = BatchOperations(source, model, positions, self.cache, self._pool)
        self._rows = RowsOperations(self._token)
        self._now: TokenOperations | RowsOperations | BatchOperations = self._batch

    def begin(self, first: int, count: int, every: bool, sequences: int = 1) -> None:
        assert sequences == 1, "the cache holds one sequence"
        assert every or count <= self.rows, "so many tokens are a prompt"
        self._now = self._batch if every else self._token if count == 1 else self._rows
        self._now.first = first

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> F32:
        return self._now.embed(tokens)

    def norm(self, index: int, place: NormPlace, x: F32) -> F32:
        return self._now.norm(index, place, x)

    def attention(self, index: int, x: F32) -> F32:
        return self._now.attention(index, x)

    def onward(self, index: int, x: F32) -> tuple[F32, F32]:
        return self._now.onward(index, x)

    def route(self, index: int, x: F32) -> Ids:
        return self._now.route(index, x)

    def settle(self, index: int, ids: Ids) -> None:
        self._now.settle(index, ids)

    def ffn(self, index: int, x: F32, mask: Mask | None = None) -> LayerFfn[F32]:
        return self._now.ffn(index, x, mask)

    def logits(self, x: F32) -> F32:
        """One row goes the way of a token: its head is read, not widened."""
        return (self._token if x.shape[0] == 1 else self._batch).logits(x)

    def host(self, x: F32) -> F32:
        return x

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._pool.close()
