"""What one text tells about every layer: centres, thresholds for a share of neurons, and the errors made.

The text goes through the exact model once. Errors are of one layer's FFN output, with the exact input: what a
layer's choice costs the model is taken to grow with them (`points.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.dial import Others
from workers.lab.evaluation.curve.journal import Stage
from workers.lab.evaluation.curve.layer import Inputs, Known, LayerFfn, best
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import DENSE, Reads, Scored, Variant

# What counts as a neuron's usual activation: its mean over all tokens, its median, or the mean over those for
# which it is not among the best by its distance to the median: only there does the centre stand for it.
Centre: TypeAlias = Literal["mean", "median", "rest"]
_CHOSEN = 0.3  # share of the best, for `rest`
_SCORES = 1 << 22  # of a layer, that quantiles are taken of
ERRORS = 1024  # tokens that a layer's errors are taken of


@dataclass(frozen=True, slots=True)
class Mode:
    """What a dial's points have in common."""

    copy: str
    others: Others = "low"
    reads: Reads = "all"
    scored: Scored = "own"

    @property
    def centred(self) -> bool:
        return self.others == "mean"

    def variant(self, name: str, thresholds: Sequence[float], only: int | None = None) -> Variant:
        return Variant(
            name,
            thresholds=tuple(thresholds),
            scored=self.scored,
            centred=self.centred,
            others=self.others,
            reads=self.reads,
            copy=self.copy,
            only=only,
        )


@dataclass(frozen=True, slots=True)
class Table:
    """Of one mode, [layers, shares] each: what a score must exceed, and the error that is left."""

    thresholds: npt.NDArray[np.float64]
    guesses: npt.NDArray[np.float64]  # thresholds of scores from the early input
    errors: npt.NDArray[np.float64]  # squared length of the output's error, as a part of the output's


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was learned from a text."""

    shares: tuple[float, ...]  # of the neurons
    centres: list[Tensor]  # of each layer [neurons]
    norms: list[Tensor]  # likewise, lengths of the down rows
    biases: list[Tensor]  # of each layer [d_model], the sum of centre · down row
    tables: dict[Mode, Table]


def centres_of(
    passes: Passes,
    tokens: npt.NDArray[np.int64],
    kind: Centre = "rest",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """Every neuron's usual activation on `tokens` [sequences, length] in the exact model, of each layer."""
    found: list[Tensor] = []

    def see(index: int, variant: Variant, ffn: LayerFfn, inputs: Inputs, chosen: Tensor) -> None:
        found.append(centre(ffn, ffn.activations(ffn.rows, inputs.own), kind))

    with torch.no_grad():
        passes.run(tokens, [DENSE], see=see, progress=progress)
    return found


def centre(ffn: LayerFfn, a: Tensor, kind: Centre) -> Tensor:
    """Of activations [n, neurons]."""
    if kind == "mean":
        return a.mean(dim=0)
    middle = a.median(dim=0).values
    if kind == "median":
        return middle
    kept = ~best(ffn.scores(a, middle), _CHOSEN)
    counts = kept.sum(dim=0)
    return torch.where(counts > 0, (a * kept).sum(dim=0) / counts.clamp(min=1), middle)


def calibrate(
    passes: Passes,
    tokens: npt.NDArray[np.int64],
    shares: Sequence[float],
    modes: Sequence[Mode],
    centres: list[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
    stage: Stage | None = None,
    errors_of: int = ERRORS,
) -> Calibration:
    """Thresholds and errors of every mode for every share of neurons, on `tokens` [sequences, length].

    Errors are taken of `errors_of` tokens.
    """
    stage = stage or Stage()

    def see(index: int, variant: Variant, ffn: LayerFfn, inputs: Inputs, chosen: Tensor) -> None:
        few = inputs.every(max(1, len(inputs.own) // errors_of))
        known: Known = {}
        learned = [_learned(ffn, mode, index, inputs, few, centres[index], shares, known) for mode in modes]
        bias = centres[index] @ ffn.rows.down
        stage.notes.append({"norm": ffn.norm.tolist(), "bias": bias.tolist(), "modes": learned})

    with torch.no_grad():
        passes.run(tokens, [DENSE], see=see, progress=progress, stage=stage)
    tables = {
        mode: Table(*(np.array([one["modes"][number][part] for one in stage.notes]) for part in range(3)))
        for number, mode in enumerate(modes)
    }
    norms, biases = ([torch.tensor(one[name]) for one in stage.notes] for name in ("norm", "bias"))
    return Calibration(tuple(shares), centres, norms, biases, tables)


def _learned(
    ffn: LayerFfn,
    mode: Mode,
    index: int,
    inputs: Inputs,
    few: Inputs,
    centre: Tensor,
    shares: Sequence[float],
    known: Known,
) -> list[list[float]]:
    """Of one layer and mode: thresholds, those of guesses, and errors on `few`, one for each share."""
    some = inputs.every(max(1, inputs.own.shape[0] * ffn.norm.numel() // _SCORES))
    thresholds = _thresholds(ffn, mode, some, centre, shares, mode.scored)
    guesses = _thresholds(ffn, mode, some, centre, shares, "early")
    none = torch.zeros(len(few.own), dtype=torch.bool)
    exact, _ = ffn.output(DENSE, index, few, centre, none, known)
    size, errors = float(exact.square().sum()), []
    for threshold in thresholds:
        one = mode.variant("", [threshold] * (index + 1))
        output, _ = ffn.output(one, index, few, centre, none, known)
        errors.append(float((output - exact).square().sum()) / size)
    return [thresholds, guesses, errors]


def _thresholds(
    ffn: LayerFfn, mode: Mode, inputs: Inputs, centre: Tensor, shares: Sequence[float], scored: Scored
) -> list[float]:
    """What the scores of these shares of neurons exceed; infinity for none, minus infinity for all."""
    rows = ffn.rows if scored == "true" else ffn.copies[mode.copy]
    scores = ffn.scores(ffn.activations(rows, inputs.of(scored)), centre if mode.centred else None).flatten()
    scores = scores.sort().values
    found = []
    for share in shares:
        place = round((1 - share) * scores.numel())
        if share >= 1:
            found.append(-np.inf)
        elif place >= scores.numel():
            found.append(np.inf)
        else:
            found.append(float(scores[max(place, 1) - 1]))
    return found
