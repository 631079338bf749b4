"""Norms on the CPU, of one token and of many."""

from __future__ import annotations

import numpy as np

from storage.architecture import Attention
from storage.codecs import F32
from workers import kernels
from workers.compute.bound import BoundLayer, BoundNorm


def normed(bound: BoundNorm, x: F32) -> F32:
    """Of x [..., width]."""
    if bound.norm.kind == "rms":
        return kernels.rms_norm(x, bound.weight, bound.norm.offset, bound.norm.epsilon)
    return kernels.layer_norm(x, bound.weight, bound.bias, bound.norm.epsilon)


def norm_queries_and_keys(attention: Attention, bound: BoundLayer, projected: F32) -> None:
    """In place, where the layer has such a norm: `projected` is [tokens, projected]."""
    if attention.qk_norm is None:
        return
    start = 0
    for norm, heads in ((bound.q_norm, attention.heads), (bound.k_norm, attention.kv_heads)):
        assert norm is not None
        some = projected[:, start : start + heads * attention.head_dim]
        width = attention.head_dim if attention.qk_norm.over == "head" else some.shape[1]
        some[:] = normed(norm, np.ascontiguousarray(some).reshape(-1, width)).reshape(some.shape)
        start += some.shape[1]
