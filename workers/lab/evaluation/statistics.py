"""Confidence intervals for what evaluation reports. All at 95 %."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z = 1.959964  # two-sided 95 %
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval; without one where there is nothing to tell it from."""

    value: float
    low: float | None = None
    high: float | None = None

    def percent(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2%} (one sample: no interval)"
        return f"{self.value:.2%} ({self.low:.2%} – {self.high:.2%})"

    def beyond(self, origin: float) -> Estimate:
        """How far it lies above `origin`."""
        if self.low is None or self.high is None:
            return Estimate(self.value - origin)
        return Estimate(self.value - origin, self.low - origin, self.high - origin)


def proportion(right: int, count: int) -> Estimate:
    """Share of right answers, with Wilson's interval."""
    if count == 0:
        raise ValueError("no items")
    share = right / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Estimate:
    """Mean of `first` − mean of `second` over the same items; normal interval of the paired mean."""
    difference = first.astype(np.float64) - second.astype(np.float64)
    mean = float(difference.mean())
    if len(difference) < 2:
        return Estimate(mean)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return Estimate(mean, mean - Z * error, mean + Z * error)


def ratio_of_perplexities(
    sparse: npt.NDArray[np.float64], dense: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], seed: int
) -> Estimate:
    """exp(mean nats of sparse − of dense), bootstrapped over chunks of text.

    `sparse`, `dense` `[chunks]`: summed nats of each chunk; `tokens` `[chunks]`.
    """
    value = math.exp((sparse.sum() - dense.sum()) / tokens.sum())
    if len(tokens) < 2:
        return Estimate(value)
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(tokens), (RESAMPLES, len(tokens)))
    shifts = (sparse - dense)[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    low, high = np.quantile(shifts, [0.025, 0.975])
    return Estimate(value, math.exp(low), math.exp(high))
