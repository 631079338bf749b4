"""A few tokens' operations on the CPU: each row by the kernels of one token.

A row has the bits that it would have alone, whatever rows are beside it: drafts are verified so. What the
rows share is the units, which are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.architecture import NormPlace
from storage.codecs import F32
from workers.compute.cpu.token import TokenFfn, TokenOperations
from workers.compute.device import I32, Bytes, Mask
from workers.routing import Ids


class RowsOperations:
    """The part of `device.Device` that is a few tokens'; x is [tokens, d_model]. Not for mixtures."""

    def __init__(self, token: TokenOperations) -> None:
        self.first = 0  # position of the first token
        self._token = token

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> F32:
        return self._by_row(lambda row: self._token.embed(tokens[row : row + 1]), tokens.size)

    def norm(self, index: int, place: NormPlace, x: F32) -> F32:
        return self._by_row(lambda row: self._token.norm(index, place, x[row : row + 1]), len(x))

    def attention(self, index: int, x: F32) -> F32:
        """Each row sees the keys and values of those before it, and none behind it."""
        return self._by_row(lambda row: self._token.attention(index, x[row : row + 1]), len(x))

    def onward(self, index: int, x: F32) -> tuple[F32, F32]:
        both = self._by_row(lambda row: np.stack(self._token.onward(index, x[row : row + 1]), 1), len(x))
        return both[:, 0], both[:, 1]

    def route(self, index: int, x: F32) -> Ids:
        raise AssertionError("a mixture's tokens come one by one")

    def settle(self, index: int, ids: Ids) -> None:
        raise AssertionError("a mixture's tokens come one by one")

    def ffn(self, index: int, x: F32, mask: Mask | None = None) -> RowsFfn:
        assert mask is None, "a token's set is given, not masked"
        return RowsFfn([self._token.plain_ffn(index, x[row], row) for row in range(len(x))])

    def _by_row(self, operation: Callable[[int], F32], rows: int) -> F32:
        """The rows' results [rows, width], one after the other, each at its own position."""
        found = []
        for row in range(rows):
            self._token.first = self.first + row
            found.append(operation(row))
        return np.concatenate(found)


class RowsFfn:
    """One layer's FFN of a few tokens, which all have the same units."""

    def __init__(self, rows: list[TokenFfn]) -> None:
        self._rows = rows
        self.active = 0  # the first row's: no draft, so certainly part of the text

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        for row in self._rows:
            row.add(ids, slots, memory)

    def close(self) -> None:
        for row in self._rows:
            row.close()
        self.active = self._rows[0].active

    def finish(self) -> F32:
        return np.concatenate([row.finish() for row in self._rows])
