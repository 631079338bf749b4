"""The first use of a model without zeros: its shadow and its dial are made, so that the default is measured.

Falcon, Llama, Qwen and their like have no neuron that may be left out for nothing: read exactly, a token
takes every row from flash. Where a token would, the store gets its shadow (`storage/shadow.py`) and a
calibration of a few minutes (`run.py calibrate --quick`, a process of its own), once. What was interrupted
goes on the next time. `predictor.calibrate=false` turns this off, and `--quality exact` needs none of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pipeline import launch, quality
from pipeline.config import Config
from pipeline.console import say, size
from pipeline.cores import thread_count
from pipeline.models.stores import Source
from pipeline.planner.budget import parse_budget
from pipeline.planner.divide import FITS, plan
from pipeline.planner.machine import available_bytes
from storage import shadow
from storage.codecs import FLOATS
from storage.dial import read_dial
from storage.errors import BudgetError, StoreError, UsageError
from storage.store import Store

CALIBRATE = "workers.lab.evaluation.curve.calibrate"
BITS = 4  # of the shadow
MINUTES = 20  # that measuring should take, at most; then there are fewer tokens
LEARNED, HELD_OUT = 1024, (2048, 1024, 512)  # tokens; of the second as many as there is time for
# Passes of one token through all FFNs, of which a pass is one product with every weight: what is learned and
# its errors, then of each layer by itself, and of each token held out in six variants of two products.
_FIXED, _OF_A_LAYER, _OF_A_TOKEN = 4000, 64, 11


def prepared(source: Source, store: Store, config: Config) -> Config:
    """The configuration to plan with, after making what its quality needs and the store lacks.

    Only a store that was converted on first use is touched; one that was given by its directory is the
    user's own (`run.py calibrate`). Raises what planning raises.
    """
    if source.store is not None or not _concerns(store, config):
        return config
    if not _is_made(store):
        if config.predictor.quality is None and not _reads(store, config):
            return config  # everything stays in memory: exact costs nothing
        why = _make(store, config)
        if why:
            return _exactly(store, config, why)
    return _default(store, config)


def make(store: Store, config: Config) -> str:
    """Make what is missing of shadow and dial; returns why there is none, or nothing."""
    return "" if _is_made(store) else _make(store, config)


def _concerns(store: Store, config: Config) -> bool:
    wanted, architecture = config.predictor, store.architecture
    if architecture.sparse or architecture.mixture or config.compute.device != "cpu":
        return False
    if any(row.codec not in FLOATS for row in store.layout.unit.rows):
        return False  # few bits already
    return wanted.calibrate and wanted.kind == "auto" and wanted.quality != "exact"


def _is_made(store: Store) -> bool:
    return shadow.path_of(store).is_file() and read_dial(store) is not None


def _reads(store: Store, config: Config) -> bool:
    """Whether a token of the exact model would read from flash."""
    return plan(store, config.replace(predictor={"quality": "exact"})).streamed_bytes > 0


def _default(store: Store, config: Config) -> Config:
    """The dial's default, or exact where that has none, or no room."""
    if config.predictor.quality is not None:
        return config
    dial = read_dial(store)
    assert dial is not None
    if dial.default == "exact":
        return _exactly(store, config, "no setting of its dial loses less than 0.5 % of perplexity")
    try:
        plan(store, config)
    except BudgetError as error:
        return _exactly(store, config, f"its shadow has no room ({error})")
    return config


def _exactly(store: Store, config: Config, why: str) -> Config:
    if config.predictor.quality is not None:
        return config  # it was asked for: planning says what is missing
    say(f"{store.manifest.name} runs exactly: {why}")
    return config.replace(predictor={"quality": "exact"})


def _make(store: Store, config: Config) -> str:
    try:
        shadow.check(store, BITS)
        if not shadow.path_of(store).is_file():
            _round(store)
        _check_room(store, config)
    except (UsageError, StoreError, BudgetError) as error:
        return str(error)
    return "" if _measure(store, config) else "its dial could not be measured"


def _round(store: Store) -> None:
    from pipeline.progress import Progress

    with Progress(f"making the shadow of {store.manifest.name}") as progress:
        shadow.write(store, BITS, lambda done, total: progress("rounding", done, total))


def _check_room(store: Store, config: Config) -> None:
    """Raises BudgetError where the memory that is allowed does not hold the shadow."""
    plan(store, config.replace(predictor={"kind": "shadow", "full_rows": quality.FULL_ROWS["balanced"]}))


@dataclass(frozen=True, slots=True)
class _Effort:
    held_out: int  # tokens
    minutes: float  # on this machine, roughly


def _effort(store: Store) -> _Effort:
    """As many tokens as there is time for."""
    rate, layers = _rate(), store.layout.layers
    weights = sum(part.units * part.unit.width * part.unit.d_model * len(part.unit.rows) for part in layers)
    found = _Effort(0, 0.0)
    for tokens in HELD_OUT:
        passes = _FIXED + _OF_A_LAYER * len(layers) + _OF_A_TOKEN * tokens
        found = _Effort(tokens, 2 * weights * passes / rate / 60)
        if found.minutes <= MINUTES:
            break
    return found


def _rate() -> float:
    """Multiplications and additions a second of this machine now, from a short try."""
    matrix = np.ones((1024, 1024), np.float32)
    matrix @ matrix
    started = time.perf_counter()
    matrix @ matrix
    return 2 * 1024**3 / (time.perf_counter() - started)


def _measure(store: Store, config: Config) -> bool:
    threads = thread_count(config.compute.threads)
    effort = _effort(store)
    budget = parse_budget(config.memory.budget, store) or int(FITS * available_bytes())
    say(
        f"measuring the dial of {store.manifest.name}, once, in about {max(1, round(effort.minutes))} min "
        f"within {size(budget)} (--quality exact goes without; if stopped, it goes on here)"
    )
    arguments = ["--model", str(store.path), "--quick", "--no-tables"]
    arguments += ["--tokens", str(LEARNED), "--held-out", str(effort.held_out)]
    arguments += ["--memory", f"{budget}B", "--threads", str(threads)]
    return launch.run_module(CALIBRATE, "run.py calibrate", arguments) == 0 and _is_made(store)
