"""Activation functions: of one value in compiled code, and of whole arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from storage.codecs import F32

# Numbers, so that one compiled kernel serves all functions; a branch for each neuron costs nothing.
# `relu` is `fatrelu` with a threshold of zero.
ACTIVATIONS: dict[str, int] = {
    "relu": 0,
    "fatrelu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "silu": 3,
    "clamped_silu": 4,
}

# As in `rows.py`; repeated because numba must see every change of what this file's own kernel is made of.
_FAST = {"reassoc", "contract"}


@njit(fastmath=_FAST)
def activation(x: Any, function: Any, numbers: Any) -> Any:
    """`numbers` are two: fatrelu's threshold, or clamped_silu's limit and alpha."""
    if function == 0:
        return x if x > numbers[0] else np.float32(0)
    if function == 1:
        return np.float32(0.5) * x * (np.float32(1) + np.float32(math.erf(x * np.float32(math.sqrt(0.5)))))
    if function == 3:
        return x / (np.float32(1) + np.float32(math.exp(-x)))
    if function == 4:
        x = min(x, numbers[0])
        return x / (np.float32(1) + np.float32(math.exp(-numbers[1] * x)))
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + np.float32(math.tanh(inner)))


@njit(fastmath=_FAST, cache=True, nogil=True)
def _activate_all(x: Any, function: Any, numbers: Any) -> None:
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.shape[0]):
            row[j] = activation(row[j], function, numbers)


def activations(x: F32, function: str, first: float = 0.0, second: float = 1.0) -> None:
    """Apply the activation function to x [n, m], in place. One thread, without the interpreter's lock.

    The numbers are an FFN's `Ffn.numbers`.
    """
    if function == "relu":
        np.maximum(x, 0, out=x)
    else:
        _activate_all(x, ACTIVATIONS[function], (np.float32(first), np.float32(second)))
