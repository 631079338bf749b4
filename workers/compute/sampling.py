"""Choosing a token from logits: pure functions.

The draw for the token at `index` comes from numpy's Philox generator with the key `seed` and the
counter `index`, so a generation is repeatable and no token depends on how the ones before it were
drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.ring.sampling import Sampling

_MASK = (1 << 64) - 1  # seeds are taken modulo 2**64


def choose(
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    index: int,
    allowed: npt.NDArray[np.intp] | None = None,
) -> int:
    """A token id from logits [vocabulary] for the generation's token `index`.

    Where ids are `allowed`, ascending, there is nothing else to choose from: before the likeliest is
    taken, before the temperature and before every limit.
    """
    if allowed is not None:
        return int(allowed[choose(logits[allowed], sampling, index)])
    if sampling.temperature <= 0 or sampling.top_k == 1:
        return int(np.argmax(logits))
    order, probabilities = candidates(logits, sampling)
    generator = np.random.Generator(np.random.Philox(key=sampling.seed & _MASK, counter=index))
    cumulated = np.cumsum(probabilities)
    place = int(np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right"))
    return int(order[min(place, order.size - 1)])


def candidates(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, most likely first, and their probabilities (sum 1).

    Temperature first, then the `top_k` most likely, then the fewest of them that hold `top_p` of
    the remaining probability: transformers' order. Equal logits are ordered by id.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        kept = max(1, int(np.count_nonzero(before < sampling.top_p)))
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return order, probabilities


def log_probability(logits: npt.NDArray[np.float32], token: int) -> float:
    """Natural logarithm of `token`'s probability at temperature 1."""
    wide = logits.astype(np.float64)
    highest = wide.max()
    return float(wide[token] - highest - np.log(np.exp(wide - highest).sum()))
