"""What one token of a plan needs: bytes of every kind, counted from a store's headers. See `pace.Work`.

What cannot be counted before a run is assumed, or taken from what the store's own measurements say: the
report in its predictors' file (`active`, `predicted`), a mixture's needs (`need.py`), and what an earlier
run of the store has left (`locality.py`).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipeline.config import Config
from pipeline.planner import pace
from pipeline.planner.locality import Seen
from pipeline.planner.need import Needs
from pipeline.ring.plan import Forecast, Plan
from storage.architecture import EMBED, HEAD, PROJECT_OUT, Layer, layer
from storage.codecs import CODECS
from storage.layout import Unit
from storage.manifest import RESIDENT
from storage.shadow import Shadow
from storage.store import Store
from storage.tensors import Tensors

Residents = Mapping[str, tuple[str, int]]  # of each resident tensor its codec and bytes
# Of a layer: every token is multiplied with them.
MATRICES: Final = ("qkv", "out", "router", "shared_gate", "shared_up", "shared_down", "shared_switch")
PREDICTED, ACTIVE = 0.1, 0.03  # of a sparse FFN, a token: the paper's, where nothing was measured
TOUCHED: Final = 0.6  # of its experts, that a prompt chooses: published, 50 to 59 % of hundreds of tokens
POSITION: Final = 256  # of the token that is meant: how many keys and values it sees


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Of the FFN's units, what one token wants; and of its neurons, how many are active."""

    wanted: float
    active: float
    locality: float = pace.LOCALITY
    measured: str = ""  # by what; empty: assumed


def residents(store: Store) -> Residents:
    """Of a store that is there."""
    return {name: (one.dtype, one.bytes) for name, one in Tensors(store.path / RESIDENT).places.items()}


def work(
    store: Store,
    tensors: Residents,
    config: Config,
    plan: Plan,
    sparsity: Sparsity,
    scored: float = 0.0,
    position: int = POSITION,
) -> pace.Work:
    """One token's, at this position. `scored`: bytes of its predictors' maps."""
    model, layout = store.architecture, store.layout
    matrices: Counter[str] = Counter()
    for index, name in itertools.product(range(plan.layers), MATRICES):
        if found := tensors.get(layer(index, f"{name}.weight")):
            matrices[found[0]] += found[1]
    if plan.forecast.shadowed:
        copy = Shadow.open(store)
        matrices[copy.codec] += copy.bytes
    head: Counter[str] = Counter()
    for name in (EMBED if model.tied_head else HEAD, PROJECT_OUT):
        if found := tensors.get(name):
            head[found[0]] += found[1]
    dots, sums = _touched(store, plan, sparsity)
    flash, request = _read(store, config, plan, sparsity)
    values = sum(size / CODECS[name].bytes * CODECS[name].block for name, size in (matrices + head).items())
    values += sum(_values(one.ffn.router.top_k if one.ffn.router else one.ffn.units, part.unit)
                  for one, part in zip(model.layers, layout.layers, strict=True))  # fmt: skip
    whole = plan.forecast.low or (plan.forecast.shadowed and not sparsity.wanted)
    prompt = (
        0.0 if whole else layout.total_bytes * (TOUCHED if plan.forecast.routed and not plan.whole else 1)
    )
    return pace.Work(
        layers=plan.layers,
        matrices=matrices,
        head=head,
        kept=sum(kept_values(one, position) for one in model.layers) * CODECS[plan.cache_dtype].bytes,
        dots=dots,
        sums=sums,
        vocabulary=model.vocabulary,
        launches=pace.LAUNCHES + bool(model.mixture),
        scored=scored,
        forecast=forecast_of(plan),
        flash=flash,
        request=request,
        prompt_flash=prompt,
        prompt_request=float(config.prefetcher.max_read),
        parameters=values,
        load=float(store.manifest.files[RESIDENT].bytes),
    )


def forecast_of(plan: Plan) -> str:
    """The model of time's word for how a plan's layers wait for their units."""
    forecast = plan.forecast
    if plan.whole or forecast.low:
        return "whole"
    if forecast.every:
        return "every"
    if forecast.refines and forecast.guesses != 0:
        return "refined"
    return "own" if forecast.from_own_input and not forecast.early else "ahead"


def kept_values(described: Layer, position: float) -> float:
    """Keys and values that a token at `position` sees, in values."""
    seen = position if described.attention.window is None else min(position, described.attention.window)
    return 2 * seen * described.attention.kv_heads * described.attention.head_dim


def sparsity_of(store: Store, config: Config, forecast: Forecast, seen: Seen | None = None) -> Sparsity:
    """What a token wants of the FFN, as far as the store itself can tell."""
    if forecast.every:
        known = ACTIVE if store.architecture.sparse else 1.0
        return Sparsity(1.0, known)
    if seen is not None:
        return Sparsity(seen.wanted, seen.active, seen.locality, f"{seen.tokens} tokens of an earlier run")
    if forecast.routed:
        chosen = [
            (one.ffn.router.top_k, one.ffn.units) for one in store.architecture.layers if one.ffn.router
        ]
        wanted = sum(top for top, _ in chosen) / sum(units for _, units in chosen)
        return Sparsity(wanted, wanted)
    if forecast.shadowed:
        return Sparsity(forecast.full_rows, forecast.full_rows)
    return _reported(store, config, forecast)


def _reported(store: Store, config: Config, forecast: Forecast) -> Sparsity:
    """As the predictors' own report has it."""
    path = store.predictors(config.model.predictor)
    if not path.is_file():
        return Sparsity(PREDICTED, ACTIVE)
    ahead = 0 if forecast.from_own_input else forecast.lookahead
    try:
        rows: list[dict[str, Any]] = json.loads(Tensors(path).metadata.get("report", "{}")).get("layers", [])
        usable = [one for one in rows if one["lookahead"] == ahead] or rows
        if not usable:
            return Sparsity(PREDICTED, ACTIVE)
        shares = [sum(float(one[key]) for one in usable) / len(usable) for key in ("predicted", "active")]
    except (ValueError, KeyError, TypeError):
        return Sparsity(PREDICTED, ACTIVE)
    return Sparsity(shares[0], shares[1], measured="the predictors' report")


def scored_bytes(store: Store, config: Config) -> int:
    """Bytes of the maps that one token goes through; a map may use the in-layer one's matrices."""
    ahead = config.predictor.lookahead > 0
    own = config.predictor.refine or not ahead
    used = [prefix for prefix, needed in (("layers", ahead), ("inlayer", own)) if needed]
    total = 0
    file = Tensors(store.predictors(config.model.predictor))
    for prefix, index, name in itertools.product(used, range(len(store.layout.layers)), ("down", "up")):
        names = [f"{one}.{index}.{name}" for one in (prefix, "inlayer", "layers")]
        found = next((one for one in names if one in file), None)
        total += file.place(found).bytes if found else 0
    return total


def _touched(store: Store, plan: Plan, sparsity: Sparsity) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of units' rows that a token's kernels read: dots and sums."""
    dots: dict[str, float] = defaultdict(float)
    sums: dict[str, float] = defaultdict(float)
    for index, part in enumerate(store.layout.layers):
        unit, ffn = part.unit, store.architecture.layers[index].ffn
        every = plan.forecast.every or index in plan.forecast.pinned
        wanted = part.units * (1.0 if every else sparsity.wanted)
        active = part.units * (sparsity.active if ffn.sparse else wanted / max(1, part.units))
        for row in unit.rows:
            size = unit.row_bytes(row.role)
            if row.role != "down":
                decides = row.role == unit.rows[0].role
                dots[row.codec] += size * (wanted if decides else min(wanted, active))
            elif unit.width > 1:  # by output: products, not sums
                dots[row.codec] += size * wanted
            else:
                sums[row.codec] += size * min(wanted, active)
    return dots, sums


def _read(store: Store, config: Config, plan: Plan, sparsity: Sparsity) -> tuple[float, float]:
    """Bytes that a token reads from flash, and of one read."""
    layout, forecast, most = store.layout, plan.forecast, config.prefetcher.max_read
    open_units = sum(plan.units) - plan.total_slots
    if not open_units or forecast.low:
        return 0.0, 1.0
    if forecast.every:
        return float(open_units * layout.stride), float(
            min(most, open_units * layout.stride / max(1, plan.layers))
        )
    needs = Needs.of(store) if forecast.routed else None
    if needs is not None and needs.wanted:
        misses = needs.misses(plan.slots) / needs.wanted
    else:
        misses = pace.missed(plan.total_slots / sum(plan.units), sparsity.wanted, sparsity.locality)
    if forecast_of(plan) == "refined":
        misses *= pace.IN_VAIN
    pieces = -(-layout.stride // most)
    return misses * sparsity.wanted * layout.total_bytes, layout.stride / pieces


def _values(units: float, unit: Unit) -> float:
    """Of so many units' rows, in values."""
    return units * len(unit.rows) * unit.width * unit.d_model
