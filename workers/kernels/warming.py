"""Making kernels ready before they are needed."""

from __future__ import annotations

import numpy as np

from storage.codecs import FLOAT32, Codec
from storage.layout import Rows
from workers.kernels.attention import attend
from workers.kernels.dense import NO_BIAS, matvec
from workers.kernels.ffn import accumulate, activate, gather
from workers.kernels.functions import activations
from workers.kernels.norms import layer_norm


def warm(codec: Codec, cache: Codec = FLOAT32) -> None:
    """Compile, or load from the cache, every kernel for weights in `codec`, keys and values in `cache`."""
    memory = np.zeros((2, 128), codec.carrier)
    up, down = Rows(memory, codec, 0, 64), Rows(memory, codec, 64, 64)
    ids = np.zeros(1, np.int32)
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    matvec(Rows.of_matrix(memory, codec), np.zeros(128, np.float32), 1)
    a = activate(up, ids, ids, x, NO_BIAS, "relu", 1)
    accumulate(down, ids, ids, a, y, 1)
    gather(up, ids, 0, 64, np.zeros((2, 64), np.float32)[:1])
    keys = np.zeros((1, 2, 64), cache.carrier)
    projected, angles = np.zeros(3 * 64, np.float32), x[:32]
    no_bias, scores = np.zeros((0, 0), np.float32), np.zeros((1, 2), np.float32)
    attend(projected, angles, angles, keys, keys, 0, 1.0, no_bias, scores, cache, 1)
    layer_norm(x, x, x, 1e-5)
    activations(np.zeros((1, 64), np.float32), "gelu")
