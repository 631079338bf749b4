"""The curve: every share of neurons, chosen by the truth and by low-bit copies, and what the others get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from storage.errors import UsageError
from storage.store import Store
from workers.lab.evaluation.curve.calibration import Calibration, Centre, Mode, calibrate, centres_of
from workers.lab.evaluation.curve.copies import Copy
from workers.lab.evaluation.curve.measure import Measured, measure
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import Variant, plain
from workers.lab.training.texts import rows

_WORDS = {"low": "{}", "mean": "mean", "nothing": "skip"}  # what the others get, in a row's name


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure, as it was asked for."""

    text: Path
    calibration: Path
    tokens: int  # of the text
    calibration_tokens: int
    length: int  # tokens of a chunk
    shares: tuple[float, ...]
    copies: tuple[str, ...]
    centre: Centre


def wanted(
    text: Path,
    calibration: Path,
    tokens: int,
    calibration_tokens: int,
    length: int,
    shares: str,
    copies: str,
    centres: str,
) -> Wanted:
    """From a command's options. Raises UsageError for what makes no sense."""
    try:
        parts = tuple(float(one) for one in shares.split(",") if one.strip())
    except ValueError:
        parts = ()
    if not parts or not all(0 < one < 1 for one in parts):
        raise UsageError(f"--shares takes numbers between 0 and 1, by commas, not {shares!r}")
    names = tuple(name.strip() for name in copies.split(",") if name.strip())
    for name in names:
        Copy.of(name)
    kind: Centre | None = next((one for one in get_args(Centre) if one == centres), None)
    if kind is None:
        raise UsageError(f"--centres is one of {', '.join(get_args(Centre))}, not {centres!r}")
    return Wanted(text, calibration, tokens, calibration_tokens, length, parts, names, kind)


def draw(
    store: Store,
    asked: Wanted,
    seed: int,
    threads: int,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Measured]:
    """Every variant of the curve on the text, the exact model first."""

    def told(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(stage, done, total)

    learned = rows(asked.calibration, store, asked.calibration_tokens, longest=asked.length)
    text = rows(asked.text, store, asked.tokens, longest=asked.length)
    passes = Passes(store, asked.copies, threads)
    centres = centres_of(passes, learned, asked.centre, told("centres"))
    modes = [Mode(copy, others) for copy in asked.copies for others in ("low", "mean", "nothing")]
    known = calibrate(passes, learned, asked.shares, modes, centres, told("thresholds"))
    variants = [*_oracles(asked.shares), *_shadows(known, asked.copies)]
    return measure(passes, text, variants, centres, seed, told("curve"))


def _oracles(shares: Sequence[float]) -> Iterator[Variant]:
    """The best neurons of each token, chosen by their true activations; the others skipped."""
    for share in shares:
        yield Variant(f"oracle {share:.0%}, skip", share=share)
        yield Variant(f"oracle {share:.0%}, mean", share=share, centred=True, others="mean")


def _shadows(known: Calibration, copies: Sequence[str]) -> Iterator[Variant]:
    """What a low-bit copy is enough for."""
    for copy in copies:
        yield plain(copy)
        for place, share in enumerate(known.shares):
            yield Variant(f"oracle {share:.0%}, {copy}", share=share, others="low", copy=copy)
            for others in ("low", "mean", "nothing"):
                mode = Mode(copy, others)
                thresholds = [float(one) for one in known.tables[mode].thresholds[:, place]]
                yield mode.variant(f"{copy} chooses {share:.0%}, {_WORDS[others].format(copy)}", thresholds)
            low = Mode(copy, "low", "down")
            thresholds = [float(one) for one in known.tables[Mode(copy)].thresholds[:, place]]
            yield low.variant(f"{copy} chooses {share:.0%}, {copy}, reads down", thresholds)
            for scored in ("early", "previous"):
                name = f"{copy} chooses {share:.0%} {scored}, {copy}"
                yield Variant(name, share, scored=scored, others="low", copy=copy)
