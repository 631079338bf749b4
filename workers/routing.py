"""Which experts a row has, and how much each counts, from a router's logits. Pure numpy.

The predictor chooses with this, and compute again: from the same row by the same kernel come the same logits,
and with them the same experts, so that only their ids travel. Where the cache has a say (`experts.prefer`,
`experts.skip`), compute takes the ids that come, and weighs them by the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.architecture import Router
from storage.codecs import F32

Ids = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Routing:
    """Of each row its experts, ascending, and their weights: both [rows, experts of a row]."""

    ids: Ids
    weights: F32
    logits: F32  # [rows, experts]: what they were chosen by


def ranked(logits: F32, top_k: int) -> Ids:
    """The experts with the largest logits, [..., top_k], likeliest first, and of equal ones the lower id."""
    order: Ids = np.argsort(-logits, axis=-1, kind="stable")
    return order[..., :top_k]


def by_use(ids: Ids, last: int) -> tuple[tuple[int, ...], int]:
    """The experts that any row of ids [rows, top_k] chose, and how many of them one of the `last` rows did.

    Those come first, ascending; then the others, the most used first.
    """
    kept = np.unique(ids[-last:])
    counts = np.bincount(ids.reshape(-1))
    counts[kept] = 0
    others = counts.nonzero()[0]
    others = others[np.argsort(-counts[others], kind="stable")]
    return (*kept.tolist(), *others.tolist()), kept.size


def route(router: Router, logits: F32) -> Routing:
    """From logits [rows, experts]."""
    return weigh(router, logits, np.sort(ranked(logits, router.top_k), axis=-1))


def weigh(router: Router, logits: F32, ids: Ids) -> Routing:
    """The same with given experts [rows, n]: the router's weights as if it had chosen them."""
    chosen = np.take_along_axis(logits, ids, axis=-1)
    if router.scores == "sigmoid":
        weights = 1 / (1 + np.exp(-chosen))
    else:
        highest = logits.max(axis=-1, keepdims=True)
        exponents = np.exp(chosen - highest)
        of = chosen if router.over == "chosen" else logits
        weights = exponents / np.exp(of - highest).sum(axis=-1, keepdims=True)
    if router.renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    if router.scale != 1:
        weights = weights * np.float32(router.scale)
    return Routing(ids, weights.astype(np.float32), logits)
