"""Normalisation of rows of float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from storage.codecs import F32


@njit(fastmath={"reassoc", "contract"}, nogil=True)  # as in functions.py
def norm_layer(x: Any, weight: Any, bias: Any, epsilon: Any, out: Any) -> None:
    width = x.shape[0]
    mean = np.float32(0)
    for j in range(width):
        mean += x[j]
    mean /= np.float32(width)
    variance = np.float32(0)
    for j in range(width):
        variance += (x[j] - mean) * (x[j] - mean)
    scale = np.float32(1) / np.float32(math.sqrt(variance / np.float32(width) + epsilon))
    weighted = weight.shape[0] > 0
    biased = bias.shape[0] > 0
    for j in range(width):
        value = (x[j] - mean) * scale
        if weighted:
            value *= weight[j]
        if biased:
            value += bias[j]
        out[j] = value


@njit(cache=True, nogil=True)
def _layer_norms(x: Any, weight: Any, bias: Any, epsilon: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        norm_layer(x[i], weight, bias, epsilon, out[i])


def layer_norm(x: F32, weight: F32, bias: F32, epsilon: float) -> F32:
    """Normalised x [..., d]; weight and bias [d] may be empty."""
    out = np.empty(x.shape, np.float32)
    width = x.shape[-1]
    _layer_norms(x.reshape(-1, width), weight, bias, np.float32(epsilon), out.reshape(-1, width))
    return out


@njit(fastmath={"reassoc", "contract"}, nogil=True)  # as in functions.py
def norm_rms(x: Any, weight: Any, offset: Any, epsilon: Any, out: Any) -> None:
    width = x.shape[0]
    squares = np.float32(0)
    for j in range(width):
        squares += x[j] * x[j]
    scale = np.float32(1) / np.float32(math.sqrt(squares / np.float32(width) + epsilon))
    for j in range(width):
        out[j] = x[j] * scale * (weight[j] + offset)


@njit(cache=True, nogil=True)
def _rms_norms(x: Any, weight: Any, offset: Any, epsilon: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        norm_rms(x[i], weight, offset, epsilon, out[i])


def rms_norm(x: F32, weight: F32, offset: float, epsilon: float) -> F32:
    """x [..., d] over its root mean square, times `weight + offset` [d]."""
    out = np.empty(x.shape, np.float32)
    width = x.shape[-1]
    rows = np.ascontiguousarray(x).reshape(-1, width)
    _rms_norms(rows, weight, np.float32(offset), np.float32(epsilon), out.reshape(-1, width))
    return out
