"""From two texts to the dial of a store: settings measured on the second, points chosen among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from storage import dial
from storage.layout import ROLES
from storage.store import Store
from workers.lab.evaluation.curve.calibration import Calibration, Mode, calibrate, centres_of
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
_WEIGHED = 2  # chunks that the layers' weights are measured on


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


def modes(copy: str) -> tuple[Mode, ...]:
    """What points are chosen from: low bits for the others, or their mean where no down rows are held."""
    return Mode(copy, "low"), Mode(copy, "low", "down"), Mode(copy, "mean")


def decide(
    passes: Passes,
    learned: Tokens,
    held_out: Tokens,
    copy: str,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Decided:
    """Learn from one text, choose by another."""

    def told(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(stage, done, total)

    centres = centres_of(passes, learned, progress=told("centres"))
    known = calibrate(passes, learned, SHARES, modes(copy), centres, told("thresholds"))
    loss = weights(passes, learned[:_WEIGHED], known, modes(copy)[0], told("layers"))
    settings = [one for mode in modes(copy) for one in along(passes, known, mode, loss, MEASURED)]
    found = measure(passes, held_out, variants(known, settings), centres, seed, told("settings"))[1:]
    named = choose(found, settings, BUDGETS)
    results = {id(setting): result for setting, result in zip(settings, found, strict=True)}
    points = {
        name: Point(setting, replace(one := results[id(setting)], variant=replace(one.variant, name=name)))
        for name, setting in named.items()
    }
    return Decided(copy, known, points, found)


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
