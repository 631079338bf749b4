"""The scorers by kind: `predictor.kind` of the configuration. A new one is a file and an entry here.

Each loads its file when it is wanted: the kernels are not imported for a kind that has no use for them.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import Config
from pipeline.ring.plan import Forecast
from storage.store import Store
from workers.predictor.scorer import Scorer


def _oracle(store: Store, config: Config, forecast: Forecast) -> Scorer:
    from workers.predictor.oracle import Oracle

    return Oracle.load(store)


def _lowrank(store: Store, config: Config, forecast: Forecast) -> Scorer:
    from workers.predictor import lowrank

    return lowrank.load(store, config.model.predictor, forecast, config.predictor.threshold)


def _router(store: Store, config: Config, forecast: Forecast) -> Scorer:
    from workers.predictor.router import RouterScorer

    return RouterScorer.load(store, forecast)


SCORERS: dict[str, Callable[[Store, Config, Forecast], Scorer]] = {
    "oracle": _oracle,
    "lowrank": _lowrank,
    "router": _router,
}


def load_scorer(store: Store, config: Config, forecast: Forecast) -> Scorer | None:
    """The scorer of the forecast's kind; None for `all`, and where compute chooses by its shadow."""
    return None if forecast.every or forecast.shadowed else SCORERS[forecast.kind](store, config, forecast)
