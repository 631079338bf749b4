"""What a configuration leaves open, decided once for a store: what `auto` and 0 stand for."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import dials, quality
from pipeline.config import Config, Model
from pipeline.planner import decoding
from pipeline.ring.plan import Forecast, Kind
from storage import shadow
from storage.errors import ConfigError, StoreError
from storage.store import Store
from storage.tensors import Tensors

DEFAULT_CONTEXT = 2048  # tokens


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration with nothing left open."""

    config: Config  # with decided kind, refine, context and sampling: what is written beside results
    forecast: Forecast
    predictor_bytes: int = 0  # of the chosen predictors' file; 0 without one
    device_bytes: int | None = None  # that may be taken of a torch device's memory; None: as few as will do


def resolve(store: Store, config: Config) -> Resolved:
    """Decide what is open. Raises ConfigError for what this model cannot do, StoreError for its damage."""
    config = quality.applied(store, config)
    limit = store.architecture.max_positions
    context = config.compute.context or min(DEFAULT_CONTEXT, limit)
    if context > limit:
        raise ConfigError(f"a context of {context:,} tokens is beyond the model's limit of {limit:,}")
    forecast = _forecast(store, config)
    decided = {"kind": forecast.kind, "refine": forecast.refine}
    config = decoding.fill(store, config)
    decided_config = config.replace(predictor=decided, compute={"context": context})
    return Resolved(decided_config, forecast, predictor_bytes(store, config))


def predictor_bytes(store: Store, config: Config) -> int:
    """Size of the chosen predictors' file; 0 when there is none."""
    try:
        return store.predictors(config.model.predictor).stat().st_size
    except FileNotFoundError:
        return 0


def _forecast(store: Store, config: Config) -> Forecast:
    wanted = config.predictor
    kind = _kind(store, config)
    if kind in ("oracle", "lowrank") and store.architecture.mixture:
        raise ConfigError(
            f"{store.manifest.name} is a mixture of experts, which its own routers choose: "
            f"predictor.kind is router or all, not {kind}"
        )
    if kind == "router" and not store.architecture.mixture:
        raise ConfigError(f"predictor.kind router needs experts, and {store.manifest.name} has none")
    dials.check(store, config, kind)
    if kind == "shadow":
        return _shadowed(store, config)
    if kind == "oracle" and not store.architecture.sparse:
        raise ConfigError(
            "predictor.kind oracle needs a ReLU model, "
            f"and {store.manifest.name} has {store.architecture.activation}"
        )
    if wanted.cache_aware and kind != "lowrank":
        raise ConfigError(f"predictor.cache_aware needs trained predictors, and predictor.kind is {kind}")
    refine, early = wanted.refine is not False, False
    if kind == "lowrank":
        refine, early = _fitting(store, config)
    if kind == "oracle" and wanted.lookahead and not refine:
        raise ConfigError("predictor.kind oracle needs predictor.lookahead 0 or predictor.refine true")
    pinned, lookahead, guesses = _pinned_layers(store, config), wanted.lookahead, None
    if kind == "router":
        if lookahead and not refine:
            raise ConfigError("a router chooses from its layer's own input: leave predictor.refine out")
        lookahead, guesses = (lookahead if wanted.guesses else 0), wanted.guesses
    prefer, skip = config.experts.prefer, config.experts.skip
    return Forecast(kind, lookahead, refine, early, pinned, wanted.cache_aware, guesses, prefer, skip)


def _shadowed(store: Store, config: Config) -> Forecast:
    """Of a store with a shadow. Raises StoreError without one."""
    shadow.Shadow.open(store)
    if config.compute.device != "cpu":
        raise ConfigError(
            f"a shadow is for compute.device cpu, not {config.compute.device}, where there is --quality exact"
        )
    wanted, pinned = config.predictor, _pinned_layers(store, config)
    if not wanted.full_rows and (wanted.cache_aware or wanted.pinned_layers):
        which = "cache_aware" if wanted.cache_aware else "pinned_layers"
        raise ConfigError(
            f"predictor.{which} is about full rows, and with predictor.full_rows 0 there are none"
        )
    point = quality.measured(store, wanted.quality)
    return Forecast(
        "shadow",
        0,
        False,
        False,
        pinned,
        wanted.cache_aware,
        guesses=None if wanted.guesses else 0,
        full_rows=wanted.full_rows,
        thresholds=() if point is None else point.thresholds,
    )


def _kind(store: Store, config: Config) -> Kind:
    """Raises ConfigError for predictors that are not there."""
    kind, name = config.predictor.kind, config.model.predictor
    has_predictors = store.predictors(name).is_file()
    if store.architecture.mixture and kind != "all":
        return "router" if kind == "auto" else kind
    if not has_predictors and (kind == "lowrank" or (kind == "auto" and name != Model().predictor)):
        others = ", ".join(
            sorted(
                file.stem
                for file in store.predictors(name).parent.glob("*.safetensors")
                if file.stem != shadow.NAME
            )
        )
        raise ConfigError(
            f"{store.manifest.name} has no predictors named {name!r}{f', only {others}' if others else ''}: "
            f"make them with `run.py train-predictor --store {store.path} --name {name} --text FILE`, "
            "or choose another model.predictor or predictor.kind"
        )
    if kind != "auto":
        return kind
    return "lowrank" if store.architecture.sparse and has_predictors else "all"


def _fitting(store: Store, config: Config) -> tuple[bool, bool]:
    """Whether to refine, and whether the predictors want hidden states before attention.

    Raises ConfigError where the predictors do not fit the configuration.
    """
    wanted, lookahead = config.predictor.refine, config.predictor.lookahead
    path = store.predictors(config.model.predictor)
    whose = f"the predictors {config.model.predictor!r} of {store.manifest.name}"
    file = Tensors(path)
    names = file.names
    try:
        trained = int(file.metadata.get("lookahead", "0"))
    except ValueError:
        raise StoreError(f"the predictors {path} are damaged: their look-ahead is not a number") from None
    own = trained == 0 or any(name.startswith("inlayer.") for name in names)
    if not own and (wanted or lookahead != trained):
        raise ConfigError(
            f"{whose} are for look-ahead {trained} "
            f"without refine: set predictor.lookahead={trained} and predictor.refine=false, or train others"
        )
    refine = own if wanted is None else wanted
    if not refine and lookahead not in {0, trained}:
        raise ConfigError(
            f"{whose} are for look-ahead {trained}, "
            f"not {lookahead}: set predictor.lookahead={trained} or predictor.refine=true, or train others"
        )
    if config.predictor.cache_aware:
        in_layer = (refine or not lookahead) and any(name.startswith("inlayer.") for name in names)
        sets = "inlayer." if in_layer else "layers."  # guesses need no such thresholds
        maps = [name[: -len(".bias")] for name in names if name.startswith(sets) and name.endswith(".bias")]
        if not maps or not all(f"{one}.absent" in names for one in maps):
            raise ConfigError(f"{whose} have no thresholds for predictor.cache_aware: train others")
    return refine, file.metadata.get("early") == "true"


def _pinned_layers(store: Store, config: Config) -> frozenset[int]:
    """By their number from the front; those that have nothing on flash are always among them."""
    units = store.layout.units
    for layer in config.predictor.pinned_layers:
        if not -len(units) <= layer < len(units):
            raise ConfigError(f"predictor.pinned_layers names layer {layer}, and the model has {len(units)}")
    asked = {layer % len(units) for layer in config.predictor.pinned_layers}
    return frozenset(asked | {layer for layer, count in enumerate(units) if not count})
