"""The dial's points: thresholds for every layer, greedily to a budget of loss.

What a share of true rows in one layer costs is taken as that layer's output error (`calibration.Table`)
times its weight, which is measured: the divergence that this error makes where all other layers are exact.
From no true rows on, the layer whose next rows save most loss a byte gets them (`path`). Settings along that
path are then measured on a held-out text, and each point is the one of fewest bytes within its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.lab.evaluation.curve.calibration import Calibration, Mode, Table
from workers.lab.evaluation.curve.journal import Stage
from workers.lab.evaluation.curve.measure import Measured, measure, row_bytes
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import Variant

F64 = npt.NDArray[np.float64]

# Of perplexity on the held-out text, against the exact model; `small` has the low-bit copy alone.
BUDGETS: dict[str, float] = {"high": 0.001, "balanced": 0.005, "fast": 0.02}
SMALL = "small"
DEFAULT = "balanced"
SHARES = (0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MEASURED = (0.0, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.7)  # of the path, means of layers
_PROBED = 0.1  # share of true rows with which a layer's weight is measured


@dataclass(frozen=True, slots=True)
class Setting:
    """Thresholds of all layers, as places in a calibration's shares."""

    mode: Mode
    places: tuple[int, ...]

    def thresholds(self, table: Table) -> tuple[float, ...]:
        return tuple(float(table.thresholds[layer, place]) for layer, place in enumerate(self.places))

    def guesses(self, table: Table) -> tuple[float, ...]:
        return tuple(float(table.guesses[layer, place]) for layer, place in enumerate(self.places))


def weights(
    passes: Passes,
    rows: npt.NDArray[np.int64],
    calibration: Calibration,
    mode: Mode,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stage: Stage | None = None,
) -> F64:
    """Of each layer, the divergence on `rows` [chunks, length] for each unit of its output's error."""
    table = calibration.tables[mode]
    place = int(np.argmin(np.abs(np.array(calibration.shares) - _PROBED)))
    layers = len(passes.store.architecture.layers)
    thresholds = [float(one) for one in table.thresholds[:, place]]
    variants = [mode.variant(f"layer {layer}", thresholds, only=layer) for layer in range(layers)]
    found = measure(passes, rows, variants, calibration.centres, 0, progress, stage)[1:]
    divergences = np.array([max(one.divergence_mean, 0.0) for one in found])
    return divergences / np.maximum(table.errors[:, place], 1e-30)


def path(losses: F64, bytes_: F64) -> Iterator[tuple[int, ...]]:
    """Places of all layers, from the first of each to the last, always by the step of most loss saved a byte.

    `losses` and `bytes_` are [layers, places]. A step may pass over places of a layer.
    """
    at = np.zeros(losses.shape[0], int)
    while True:
        yield tuple(int(one) for one in at)
        best, chosen = -np.inf, None
        for layer, place in enumerate(at):
            for further in range(place + 1, losses.shape[1]):
                more = bytes_[layer, further] - bytes_[layer, place]
                saved = (losses[layer, place] - losses[layer, further]) / max(more, 1e-30)
                if saved > best:
                    best, chosen = saved, (layer, further)
        if chosen is None:
            return
        at[chosen[0]] = chosen[1]


def along(
    passes: Passes, calibration: Calibration, mode: Mode, loss: F64, shares: Sequence[float]
) -> list[Setting]:
    """Settings of the greedy path, the first with each of `shares` of all rows' bytes.

    `loss` [layers]: the weight of each layer's error.
    """
    layers = len(passes.store.architecture.layers)
    variant = mode.variant("", [0.0] * layers)
    sizes = np.array([row_bytes(passes.store, layer, variant) for layer in range(layers)], float)
    bytes_ = sizes[:, None] * np.array(calibration.shares)
    errors = np.minimum.accumulate(calibration.tables[mode].errors, axis=1)
    wanted, found = sorted(shares), list[Setting]()
    for places in path(loss[:, None] * errors, bytes_):
        share = sum(bytes_[layer, place] for layer, place in enumerate(places)) / sizes.sum()
        while wanted and share >= wanted[0] - 1e-9:
            del wanted[0]
            if not found or found[-1].places != places:
                found.append(Setting(mode, places))
    return found


def variants(calibration: Calibration, settings: Sequence[Setting]) -> list[Variant]:
    """To measure, in the settings' order."""
    return [
        one.mode.variant(f"{one.mode.others}, {one.mode.reads}", one.thresholds(calibration.tables[one.mode]))
        for one in settings
    ]


def lost(result: Measured) -> float:
    """Perplexity's change, or the divergence where that is more.

    The divergence is what the change would be on endless text of the model's own, and is far less noisy.
    """
    return max(result.ratio.value - 1, result.divergence_mean)


def choose(
    measured: Sequence[Measured], settings: Sequence[Setting], budgets: Mapping[str, float]
) -> dict[str, Setting]:
    """Of every budget the setting of fewest bytes within it; a budget that none keeps has no point.

    `small` is the setting that reads nothing.
    """
    found: dict[str, Setting] = {}
    ordered = sorted(zip(measured, settings, strict=True), key=lambda pair: pair[0].bytes_per_token)
    for name, budget in budgets.items():
        within = [one for result, one in ordered if lost(result) <= budget]
        if within:
            found[name] = within[0]
    nothing = [one for result, one in ordered if result.bytes_per_token == 0]
    if nothing:
        found[SMALL] = nothing[0]
    return found
