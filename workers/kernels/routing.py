"""A token's experts from its router's logits, in compiled code: what `workers.routing` says in numpy.

The chosen experts are the same. A weight may differ in its last bit, for numpy has an exponential of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from storage.architecture import Router
from storage.codecs import F32
from workers.routing import Ids, Routing


@njit(cache=True, nogil=True)
def _choose(
    logits: Any, sigmoid: Any, over_chosen: Any, renormalise: Any, scale: Any, ids: Any, weights: Any
) -> None:
    count, wanted = logits.shape[0], ids.shape[0]
    taken = np.zeros(count, np.bool_)
    for _ in range(wanted):  # of equal ones the lower id
        best = -1
        for i in range(count):
            if not taken[i] and (best < 0 or logits[i] > logits[best]):
                best = i
        taken[best] = True
    place = 0
    highest = logits[0]
    for i in range(count):
        highest = max(highest, logits[i])
        if taken[i]:
            ids[place] = i
            place += 1
    total = np.float32(0)
    for i in range(count):
        if not sigmoid and (taken[i] or not over_chosen):
            total += np.float32(math.exp(logits[i] - highest))
    chosen = np.float32(0)
    for k in range(wanted):
        one = logits[ids[k]]
        if sigmoid:
            weights[k] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-one)))
        else:
            weights[k] = np.float32(math.exp(one - highest)) / total
        chosen += weights[k]
    for k in range(wanted):
        if renormalise:
            weights[k] /= chosen
        weights[k] *= scale


def choose(router: Router, logits: F32) -> Routing:
    """`workers.routing.route` of one row's logits [1, experts], finite or not."""
    ids: Ids = np.empty((1, router.top_k), np.intp)
    weights = np.empty((1, router.top_k), np.float32)
    _choose(
        logits[0],
        router.scores == "sigmoid",
        router.over == "chosen",
        router.renormalise,
        np.float32(router.scale),
        ids[0],
        weights[0],
    )
    return Routing(ids, weights, logits)
