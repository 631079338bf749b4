"""Training one layer's low-rank map.

Start: reduced-rank regression of the layer's pre-activations on the inputs, in closed form. The
pre-activations are linear in the layer's own input, so two covariances of inputs suffice and no
pre-activation is ever stored. Each neuron's row is then divided by what the map leaves unexplained
of it, which turns scores into log-odds (1.702 · z approximates the probit by the logistic function).
Where two projections decide (dReLU) there is no such target: activity itself, 0 or 1, is regressed on the
inputs, and the discriminant of two classes of one covariance gives the log-odds.

Then, from there, Deja Vu's recipe: binary cross-entropy on whether a neuron is active, negatives weighted
with w, the batch's active density + 0.005; AdamW with weight decay 0.01; batches of 1024 tokens;
the best state on validation text is kept, and training stops when it no longer improves. The paper's
threshold of 1/2 becomes a calibrated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from workers.lab.training import report
from workers.lab.training.activations import F16, Samples
from workers.lab.training.lowmap import LowMap

PROBIT = 1.702  # logistic(1.702 z) is within 0.01 of the normal distribution's Φ(z)
STATISTICS_ROWS = 4_096  # read at once
CALIBRATION_ROWS = 4_096  # tokens; scores take rows · d_ff · 4 bytes
RIDGE = 1e-4  # of the inputs' mean variance
GRADIENT_SCALE = 64.0  # keeps gradients far above Adam's epsilon; Adam ignores it otherwise
RANK_STEP = 4


@dataclass(frozen=True, slots=True)
class MapRecipe:
    """Everything that decides the trained map, apart from the samples."""

    epochs: float = 1.0
    rate: float = 3e-3  # AdamW's, falling linearly to zero
    weight_decay: float = 0.01
    batch: int = 1024  # tokens
    evaluations: int = 8  # on validation text, over the whole training
    patience: int = 5  # evaluations without gain before stopping
    false_negatives: float = 0.05  # share of the active neurons that the threshold may miss
    guesses_miss: float = 0.2  # likewise, of guesses: what they miss is read later, what they waste is not
    resident_miss: float = 0.03  # likewise, where residency is looked at: a resident neuron costs little
    absent_miss: float = 0.1  # and an absent one a read
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Regression:
    """Best linear prediction of pre-activations from inputs, ready to be cut to any rank. Float64.

    With `binary`, of whether a neuron is active, 0 or 1, in the pre-activation's place.
    """

    mean: Tensor  # [d_model] of the inputs
    expected: Tensor  # [d_ff] pre-activations' mean
    variance: Tensor  # [d_ff] of the pre-activations
    half: Tensor  # [d_model, d_model]: square root of the inputs' covariance
    inverse_half: Tensor
    coefficients: Tensor  # [d_ff, d_model] of the whitened inputs
    strengths: Tensor  # [d_model] ascending: variance explained by each direction, neurons equal
    directions: Tensor  # [d_model, d_model], one column each
    binary: bool = False

    @classmethod
    def of(cls, up: Tensor, bias: Tensor, source: F16, target: F16) -> Regression:
        """`source` and `target` `[n, d_model]`: what is known early, and the layer's own FFN input.

        `up` `[d_ff, d_model]` and `bias` `[d_ff]` are the layer's.
        """
        mean, covariance, mean_target, own, cross = _moments(source, target)
        weights = up.double()
        variance = ((weights @ own) * weights).sum(1)
        return cls._solved(mean, covariance, cross, weights @ mean_target + bias.double(), variance, weights)

    @classmethod
    def of_activity(cls, samples: Samples) -> Regression:
        """Of active neurons alone, whatever decides them."""
        mean, covariance, share, cross = _activity_moments(samples)
        least = 0.5 / len(samples)  # a neuron that was never seen active may be so yet
        share = share.clamp(least, 1 - least)
        return cls._solved(mean, covariance, cross, share, share * (1 - share))

    @classmethod
    def _solved(
        cls,
        mean: Tensor,
        covariance: Tensor,
        cross: Tensor,
        expected: Tensor,
        variance: Tensor,
        weights: Tensor | None = None,
    ) -> Regression:
        """`cross` `[n, d_model]`: the covariance of n values with the inputs.

        The targets are those values themselves, or what `weights` `[d_ff, n]` makes of them.
        """
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance + ridge)
        half = (vectors * values.sqrt()) @ vectors.T
        inverse_half = (vectors / values.sqrt()) @ vectors.T
        coefficients = cross @ inverse_half
        if weights is not None:
            coefficients = weights @ coefficients
        variance = variance.clamp_min(1e-12)
        normed = coefficients / variance.sqrt()[:, None]  # every neuron counts the same
        strengths, directions = torch.linalg.eigh(normed.T @ normed)
        return cls(
            mean,
            expected,
            variance,
            half,
            inverse_half,
            coefficients,
            strengths.clamp_min(0),
            directions,
            binary=weights is None,
        )

    def map(self, rank: int, scale: float) -> LowMap:
        """The best map of this rank; scores are log-odds of being active."""
        kept = self.directions[:, -rank:]
        up = self.coefficients @ kept
        down = kept.T @ self.inverse_half
        explained = up.square().sum(1)
        left = (self.variance - explained).clamp_min(0) + 1e-4 * self.variance
        centre = up @ (down @ self.mean)
        if self.binary:
            steepness = 1 / left
            middle = centre + (0.5 - self.expected) * explained / self.variance  # of the two classes
            bias = torch.logit(self.expected) - steepness * middle
        else:
            steepness = PROBIT / left.sqrt()
            bias = (self.expected - centre) * steepness
        return LowMap(down.float().contiguous(), (up * steepness[:, None]).float(), bias.float(), scale)


def _moments(source: F16, target: F16) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, the covariance of each, and `[target, source]` covariance; float64, read in blocks."""
    width = source.shape[1]
    sums = torch.zeros(2 * width, dtype=torch.float64)
    products = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    for start in range(0, len(source), STATISTICS_ROWS):
        rows = slice(start, start + STATISTICS_ROWS)
        both = torch.from_numpy(np.hstack([source[rows], target[rows]]).astype(np.float32))
        sums += both.sum(0, dtype=torch.float64)
        products += both.T @ both
    mean = sums / len(source)
    covariance = products / len(source) - mean[:, None] * mean
    known, wanted = slice(0, width), slice(width, None)
    return (
        mean[known],
        covariance[known, known],
        mean[wanted],
        covariance[wanted, wanted],
        covariance[wanted, known],
    )


def _activity_moments(samples: Samples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs' mean and covariance, share active, `[d_ff, d_model]` covariance; float64, read in blocks."""
    width, count = samples.inputs.shape[1], len(samples)
    sums, share = torch.zeros(width, dtype=torch.float64), torch.zeros(samples.d_ff, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(samples.d_ff, width, dtype=torch.float64)
    for start in range(0, count, STATISTICS_ROWS):
        inputs, active = samples.rows(slice(start, start + STATISTICS_ROWS))
        chosen = active.float()
        sums += inputs.sum(0, dtype=torch.float64)
        share += chosen.sum(0, dtype=torch.float64)
        products += inputs.T @ inputs
        cross += chosen.T @ inputs
    mean, share = sums / count, share / count
    return mean, products / count - mean[:, None] * mean, share, cross / count - share[:, None] * mean


def allot(strengths: Sequence[Tensor], total: int) -> list[int]:
    """Ranks whose sum is at most `total`, more where recall is hard.

    A map's next RANK_STEP directions go to the one that still gains most explained variance by
    them; `strengths` are the maps' `Regression.strengths`. Every map gets one step first.
    """
    gains = [torch.flip(values, [0]) for values in strengths]
    ranks = [min(RANK_STEP, len(values)) for values in gains]
    steps = sorted(
        (
            (-float(values[at : at + RANK_STEP].sum()), index)
            for index, values in enumerate(gains)
            for at in range(RANK_STEP, len(values), RANK_STEP)
        ),
    )
    left = total - sum(ranks)
    for _, index in steps:
        step = min(RANK_STEP, len(gains[index]) - ranks[index])
        if step > left:
            break
        ranks[index] += step
        left -= step
    return ranks


def train(
    start: LowMap, samples: Samples, validation: Samples, recipe: MapRecipe, device: torch.device
) -> LowMap:
    """Improve a map on samples; the best state on validation text, which may be the start."""
    steps = int(recipe.epochs * len(samples)) // recipe.batch
    if not steps:
        return start
    parts = [part.to(device).clone() for part in (start.down, start.up, start.bias)]
    optimizer = torch.optim.AdamW(parts, lr=recipe.rate, weight_decay=recipe.weight_decay)
    generator = np.random.default_rng(recipe.seed)
    watched = validation.part(0, CALIBRATION_ROWS).rows(slice(None))
    best, best_error, without_gain = start, _selection(start, watched, recipe), 0
    every = max(1, steps // recipe.evaluations)
    for step in range(steps):
        which = np.sort(generator.integers(0, len(samples), recipe.batch))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * (1 - step / steps)
        _gradients(parts, *(rows.to(device) for rows in samples.rows(which)))
        optimizer.step()
        if (step + 1) % every and step + 1 < steps:
            continue
        down, up, bias = (part.detach().cpu().clone() for part in parts)
        now = LowMap(down, up, bias, start.scale)
        error = _selection(now, watched, recipe)
        without_gain = 0 if error < best_error else without_gain + 1
        if error < best_error:
            best, best_error = now, error
        if without_gain >= recipe.patience:
            break
    return best


def _gradients(parts: list[Tensor], inputs: Tensor, active: Tensor) -> None:
    """Of the weighted cross-entropy, written out: autograd would keep `[batch, d_ff]` several times."""
    down, up, bias = parts
    truth = active.float()
    weight = float(truth.mean()) + 0.005
    inner = inputs @ down.T
    slope = torch.addmm(bias, inner, up.T).sigmoid_().sub_(truth)
    slope.mul_(truth.mul_(1 - weight).add_(weight)).mul_(GRADIENT_SCALE / slope.numel())
    up.grad = slope.T @ inner
    bias.grad = slope.sum(0)
    down.grad = (slope @ up).T @ inputs


def _selection(candidate: LowMap, watched: tuple[Tensor, Tensor], recipe: MapRecipe) -> float:
    """False positives where the threshold misses just the allowed share: lower is better."""
    inputs, active = watched
    scores = candidate.scores(inputs)
    least = report.threshold(scores, active, recipe.false_negatives)
    return report.Counts.of(scores > least, active).false_positives


def calibrated(candidate: LowMap, validation: Samples, recipe: MapRecipe) -> LowMap:
    """Rounded to the file's precision, with the threshold folded in that misses the recipe's share.

    The other thresholds are relative to that one.
    """
    rounded = candidate.rounded()
    inputs, active = validation.part(0, CALIBRATION_ROWS).rows(slice(None))
    scores = rounded.scores(inputs)
    threshold = report.threshold(scores, active, recipe.false_negatives)

    def missing(share: float) -> float:
        return report.threshold(scores, active, share) - threshold

    return replace(
        rounded.shifted(threshold),
        guess=missing(max(recipe.false_negatives, recipe.guesses_miss)),
        resident=missing(min(recipe.false_negatives, recipe.resident_miss)),
        absent=missing(max(recipe.false_negatives, recipe.absent_miss)),
    )


def quality(candidate: LowMap, held_out: Samples) -> report.Counts:
    """Over all held-out tokens, in blocks."""
    blocks = (held_out.rows(slice(at, at + 1024)) for at in range(0, len(held_out), 1024))
    return report.count((candidate.scores(inputs), active) for inputs, active in blocks)
