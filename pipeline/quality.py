"""One dial for every model, from its weights as they are to its fastest: `--quality`, `predictor.quality`.

What a word stands for hangs on the model. A ReLU model's predictors cut more or less, a mixture prefers
experts in memory more or less, and a model without zeros reads the full rows of more or fewer neurons, while
its shadow (`storage/shadow.py`) serves the others. docs/quality.md has what each costs and keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.config import Config, Quality
from storage import shadow
from storage.codecs import FLOATS
from storage.dial import DialPoint, read_dial
from storage.errors import ConfigError, UsageError
from storage.store import Store

WORDS: tuple[str, ...] = get_args(Quality)

Settings = Mapping[str, Mapping[str, Any]]  # section → key → value
_EXACT: Settings = {
    "predictor": {"kind": "all", "cache_aware": False},
    "experts": {"per_token": 0, "prefer": 0.0, "skip": 0.0},
}
_SPARSE: dict[str, Settings] = {
    "high": {"predictor": {"threshold": -1.0}},
    "balanced": {},  # as the predictors are calibrated, or the model's file in `configs/` says
    "fast": {"predictor": {"threshold": 0.5}},
}
_MIXTURE: dict[str, Settings] = {
    "high": {"experts": {"prefer": 0.05}},
    "balanced": {"experts": {"prefer": 0.1}},
    "fast": {"experts": {"prefer": 0.2}},
}
FULL_ROWS = {"high": 0.2, "balanced": 0.1, "fast": 0.03, "small": 0.0}  # of a layer's neurons


def check_word(word: str) -> str:
    """Raises UsageError for one that is no quality; an empty one is none, too."""
    if word and word not in WORDS:
        raise UsageError(f"--quality is one of {', '.join(WORDS)}, not {word!r}")
    return word


def applied(store: Store, config: Config) -> Config:
    """The configuration with what its quality stands for; that precedes other settings.

    Where nothing is asked for, a model whose dial was measured has the best point of it. Raises ConfigError
    for a quality that this store does not have.
    """
    word = config.predictor.quality or _default(store, config)
    if word is None:
        return config
    found = _EXACT if word == "exact" else _inexact(store, config, word)
    if word == "exact" and store.architecture.mixture:
        found = {"experts": _EXACT["experts"]}  # its routers are exact
    return config.replace(**{**found, "predictor": {**found.get("predictor", {}), "quality": word}})


def _default(store: Store, config: Config) -> str | None:
    """The quality that the store's dial names as its best; None where none was measured."""
    if config.predictor.kind != "auto" or config.compute.device != "cpu":
        return None
    if store.architecture.sparse or not shadow.path_of(store).is_file():
        return None
    dial = read_dial(store)
    if dial is None or (dial.default != "exact" and measured(store, dial.default) is None):
        return None
    return dial.default


@dataclass(frozen=True, slots=True)
class Measured:
    """A point of the store's dial, and what it was measured on."""

    point: DialPoint
    thresholds: tuple[float, ...]  # [layers]
    text: str
    tokens: int

    def describe(self) -> str:
        one = self.point
        return (
            f"perplexity {one.perplexity:+.2%} ({one.perplexity_low:+.2%} to {one.perplexity_high:+.2%}) "
            f"on {self.tokens:,} tokens of {self.text}"
        )


def measured(store: Store, word: str | None) -> Measured | None:
    """The point of this name, where the store's dial has one that a ring can run, with the shadow it has."""
    if word is None or word == "exact" or not shadow.path_of(store).is_file():
        return None
    dial, roles = read_dial(store), [row.role for row in store.layout.unit.rows]
    if dial is None or dial.shadow != dict.fromkeys(roles, shadow.Shadow.open(store).codec):
        return None
    for point in dial.points:
        if point.name == word and point.others == "low" and set(point.reads) == set(roles):
            thresholds = tuple(float(one) for one in dial.thresholds[word].threshold)
            return Measured(point, thresholds, dial.held_out.name, dial.held_out.tokens)
    return None


def _inexact(store: Store, config: Config, word: str) -> Settings:
    """Raises ConfigError where the store has nothing to be inexact with."""
    name = store.manifest.name
    if store.architecture.mixture:
        points, lacks = (
            _MIXTURE,
            "is a mixture of experts, whose smallest form is a store of its own: --bits 4",
        )
    elif store.architecture.sparse and store.predictors(config.model.predictor).is_file():
        points, lacks = _SPARSE, "is sparse, and not read whole: --memory makes it small"
    elif shadow.path_of(store).is_file():
        return _shadowed(store, word)
    else:
        points, lacks = {}, _remedy(store)
    if word not in points:
        raise ConfigError(f"there is no quality {word} of {name}, which {lacks}")
    return points[word]


def _shadowed(store: Store, word: str) -> Settings:
    found = measured(store, word)
    share = FULL_ROWS[word] if found is None else found.point.share
    return {"predictor": {"kind": "shadow", "full_rows": share}}


def _remedy(store: Store) -> str:
    """What a store lacks that can only run exactly."""
    if store.architecture.sparse:
        return f"has no predictors: make them with `run.py train-predictor --store {store.path} --text FILE`"
    if any(row.codec not in FLOATS for row in store.layout.unit.rows):
        return "has few bits already"
    return f"has no shadow: make one with `run.py shadow {store.path}`"


def in_words(store: Store, config: Config) -> tuple[str, ...]:
    """What of a resolved configuration's shadow is lossy; nothing without one."""
    if config.predictor.kind != "shadow":
        return ()
    share, codec = config.predictor.full_rows, shadow.Shadow.open(store).codec
    return (f"FFN in {codec}" + (f", but for {100 * share:.3g} % of its neurons" if share else ""),)


def describe(store: Store, config: Config) -> str:
    """What a resolved configuration's shadow means for a token, as one sentence; empty without one."""
    found = in_words(store, config)
    if not found:
        return ""
    word, rows = config.predictor.quality, config.predictor.full_rows * store.layout.total_bytes
    reads = f"whose rows a token reads, {rows / 1e9:.2g} GB without slots" if rows else "nothing is read"
    point = measured(store, word)
    cost = "what that costs was not measured" if point is None else point.describe()
    return f"{f'quality {word}' if word else 'a shadow'}: {found[0]}, {reads}; {cost}"
