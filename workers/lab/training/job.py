"""What is to be made of a store's activations, and the making of one map after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from storage.errors import UsageError
from storage.store import Store
from workers.lab.training import activations, fit, svd
from workers.lab.training.activations import Activations
from workers.lab.training.lowmap import LowMap
from workers.predictor.lowrank import AHEAD, OWN

METHODS = ("trained", "regression", "svd")
LEAST_SHARE = 0.05  # of the text, for validation (and again for the report without --held-out)


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What is to be made."""

    lookahead: int = 1
    inlayer: bool = True  # also maps for look-ahead 0, which `refine` needs
    rank: int | None = None  # None: by `budget`, more where recall is hard
    budget: float = 0.08  # of the FFN's bytes, for the whole file
    method: str = "trained"
    early: bool = False  # from the stream before attention, so that reads have that time, too
    recipe: fit.MapRecipe = field(default_factory=fit.MapRecipe)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.lookahead < 0:
            raise UsageError("--lookahead must not be negative")
        if self.rank is not None and self.rank < 1:
            raise UsageError("--rank must be positive, or auto")
        if not 0 < self.budget <= 1:
            raise UsageError("--budget is a share of the FFN's bytes, above 0 and at most 1")
        for share, option in (
            (self.recipe.false_negatives, "--false-negatives"),
            (self.recipe.guesses_miss, "--guesses-miss"),
            (self.recipe.resident_miss, "--resident-miss"),
            (self.recipe.absent_miss, "--absent-miss"),
        ):
            if not 0 <= share < 1:
                raise UsageError(f"{option} is a share, from 0 to below 1")

    def maps(self, layers: int) -> list[tuple[str, int, int]]:
        """(prefix, layer, look-ahead) of all maps, in the file's order."""
        sets = [(AHEAD, self.lookahead)] + ([(OWN, 0)] if self.inlayer and self.lookahead else [])
        # A layer below the look-ahead is predicted from the embedding.
        return [(prefix, layer, ahead) for prefix, ahead in sets for layer in range(layers)]


@dataclass(frozen=True, slots=True)
class Split:
    """Tokens for training, for choosing and calibrating, and for the report: end of each."""

    train: int
    validation: int
    held_out: int

    @classmethod
    def of(cls, rows: int, held_out_rows: int, length: int) -> Split:
        """`rows` of text, of which the last are held out unless `held_out_rows` follow them."""
        share = max(1, round(rows * LEAST_SHARE))
        train = rows - (share if held_out_rows else 2 * share)
        if train < 1:
            raise UsageError(
                f"{rows} rows of {length} tokens are too few to train, to calibrate and to report on: "
                "raise --tokens, or give a longer text"
            )
        validation = train + share
        return cls(train * length, validation * length, (rows + held_out_rows) * length)


@dataclass(slots=True)
class Fitting:
    """Makes one calibrated map after the other."""

    store: Store
    recorded: Activations
    split: Split
    job: TrainingJob
    _decomposed: tuple[tuple[int, int], LowMap] | None = None  # the last, by layer and rank

    def fit(self, layer: int, ahead: int, rank: int) -> LowMap:
        job, split, samples = self.job, self.split, self.recorded.samples(layer, ahead)
        validation = samples.part(split.train, split.validation)
        if job.method == "svd":
            made = replace(self._decompose(layer, rank), scale=samples.scale)
        else:
            made = regression(self.store, self.recorded, split, layer, ahead).map(rank, samples.scale)
        if job.method == "trained":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            made = fit.train(made, samples.part(0, split.train), validation, job.recipe, device)
        return fit.calibrated(made, validation, job.recipe)

    def _decompose(self, layer: int, rank: int) -> LowMap:
        """The same for every look-ahead."""
        if self._decomposed is None or self._decomposed[0] != (layer, rank):
            (one,) = activations.deciding(self.store, layer)
            self._decomposed = (layer, rank), svd.decompose(*one, rank)
        return self._decomposed[1]


def regression(store: Store, recorded: Activations, split: Split, layer: int, ahead: int) -> fit.Regression:
    deciding = activations.deciding(store, layer)
    if len(deciding) > 1:
        return fit.Regression.of_activity(recorded.samples(layer, ahead).part(0, split.train))
    source = recorded.inputs(layer - ahead)[: split.train]
    return fit.Regression.of(*deciding[0], source, recorded.targets(layer)[: split.train])
