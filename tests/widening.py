"""Stored values as compiled code widens them, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from storage.layout import Rows
from workers.kernels.rows import loops


@njit
def _widen(codec: Any, memory: Any, at: Any, start: Any, width: Any, out: Any) -> None:
    for i in range(at.shape[0]):
        codec.widen_row(memory, at[i], start, width, out[i])


def widened(rows: Rows, vectors: np.ndarray, start: int, width: int) -> np.ndarray:
    """Values [start, start + width) of some vectors, counted through all lines: [n, width] float32."""
    line, within = np.divmod(vectors.astype(np.int64), rows.count)
    at = line * rows.memory.shape[1] + rows.start + within * rows.elements
    out = np.empty((vectors.size, width), np.float32)
    _widen(loops(rows.codec), rows.memory.reshape(-1), at, start, rows.width, out)
    return out
