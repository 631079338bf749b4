"""From two texts to the dial of a store: settings measured on the second, points chosen among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage import dial
from storage.layout import ROLES
from storage.store import Store
from workers.lab.evaluation.curve.calibration import ERRORS, Calibration, Mode, calibrate, centres_of
from workers.lab.evaluation.curve.journal import Journal
from workers.lab.evaluation.curve.measure import Measured, measure, read_roles
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.points import (
    BUDGETS,
    DEFAULT,
    MEASURED,
    SHARES,
    Setting,
    along,
    choose,
    variants,
    weights,
)

Tokens = npt.NDArray[np.int64]  # [chunks, length]
Ways: TypeAlias = Literal["low", "down", "mean"]
WAYS: tuple[Ways, ...] = get_args(Ways)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    ways: tuple[Ways, ...] = ("low",)  # the first is the one that a ring runs, and points are of
    settings: tuple[float, ...] = MEASURED  # means of layers, along the path
    errors: int = ERRORS  # tokens that each layer's errors are taken of
    weighed: int = 1024  # tokens that the layers' weights are measured on


USUAL = Effort()
QUICK = Effort(settings=(0.0, 0.03, 0.08, 0.2, 0.45), errors=128, weighed=64)


@dataclass(frozen=True, slots=True)
class Point:
    """A setting by the dial's name, with its cost on the held-out text."""

    setting: Setting
    result: Measured


@dataclass(frozen=True, slots=True)
class Decided:
    """The points of one store and one low-bit copy."""

    copy: str
    calibration: Calibration
    points: dict[str, Point]  # by name, best first
    path: list[Measured]  # everything that was measured to choose them

    @property
    def default(self) -> str:
        """The fastest point that is within the default's budget; `exact` where there is none."""
        return DEFAULT if DEFAULT in self.points else "exact"


def modes(copy: str, ways: Sequence[Ways] = WAYS) -> tuple[Mode, ...]:
    """Low bits for the others, with all true rows of the chosen or their down rows alone; or their mean."""
    every = {"low": Mode(copy, "low"), "down": Mode(copy, "low", "down"), "mean": Mode(copy, "mean")}
    return tuple(every[way] for way in WAYS if way in ways)


def decide(
    passes: Passes,
    learned: Tokens,
    held_out: Tokens,
    copy: str,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    effort: Effort = USUAL,
    journal: Journal | None = None,
) -> Decided:
    """Learn from one text, choose by another.

    Every way is measured; points are chosen among settings of the first, which a ring runs.
    """

    journal = journal or Journal()

    def told(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(stage, done, total)

    known = calibrate(
        passes,
        learned,
        SHARES,
        ways := modes(copy, effort.ways),
        _centres(passes, learned, effort, told("centres")),
        told("thresholds"),
        journal.stage("thresholds"),
        effort.errors,
    )
    weighed = learned[: max(1, effort.weighed // learned.shape[1]), : effort.weighed]
    loss = weights(passes, weighed, known, ways[0], told("layers"), journal.stage("layers"))
    settings = [one for way in ways for one in along(passes, known, way, loss, effort.settings)]
    found = measure(
        passes,
        held_out,
        variants(known, settings),
        known.centres,
        seed,
        told("settings"),
        journal.stage("settings"),
    )[1:]
    runnable = [pair for pair in zip(found, settings, strict=True) if pair[1].mode == ways[0]]
    named = choose([result for result, _ in runnable], [setting for _, setting in runnable], BUDGETS)
    results = {id(setting): result for setting, result in zip(settings, found, strict=True)}
    points = {
        name: Point(setting, replace(one := results[id(setting)], variant=replace(one.variant, name=name)))
        for name, setting in named.items()
    }
    return Decided(copy, known, points, found)


def _centres(
    passes: Passes, learned: Tokens, effort: Effort, progress: Callable[[int, int], None]
) -> list[Tensor]:
    """Zeros where nothing is served by its mean: that saves a pass."""
    if "mean" in effort.ways:
        return centres_of(passes, learned, progress=progress)
    return [torch.zeros(layer.ffn.neurons) for layer in passes.store.architecture.layers]


def described(store: Store, decided: Decided, text: str, learned: int, held_out: int) -> dial.Dial:
    """What the store keeps of it. `learned` and `held_out` are numbers of tokens of the text named so."""
    known, layers = decided.calibration, list[dial.DialLayer]()
    points, thresholds = list[dial.DialPoint](), dict[str, dial.Thresholds]()
    for norm, bias, centre in zip(known.norms, known.biases, known.centres, strict=True):
        layers.append(dial.DialLayer(norm.numpy(), centre.numpy(), bias.numpy()))
    for name, point in decided.points.items():
        table, result = known.tables[point.setting.mode], point.result
        thresholds[name] = dial.Thresholds(
            np.array(point.setting.thresholds(table), np.float32),
            np.array(point.setting.guesses(table), np.float32),
        )
        low, high = result.ratio.low, result.ratio.high
        points.append(
            dial.DialPoint(
                name=name,
                others=point.setting.mode.others,
                reads=read_roles(store.architecture.layers[0].ffn, result.variant),
                perplexity=result.ratio.value - 1,
                perplexity_low=(result.ratio.value if low is None else low) - 1,
                perplexity_high=(result.ratio.value if high is None else high) - 1,
                divergence_mean=result.divergence_mean,
                divergence_p99=result.divergence_p99,
                agreement=result.agreement.value,
                share=result.share,
                bytes_per_token=result.bytes_per_token,
                memory=result.memory,
            )
        )
    roles = ROLES[store.architecture.layers[0].ffn.kind]
    return dial.Dial(
        shadow=dict.fromkeys(roles, decided.copy),
        calibration=dial.Text(text, learned),
        held_out=dial.Text(text, held_out),
        default=decided.default,
        points=tuple(points),
        layers=tuple(layers),
        thresholds=thresholds,
    )
