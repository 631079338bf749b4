"""Divides the memory: what one ring holds, how large each part is, and whether a budget allows it.

Slots take what is left. Everything else is decided by the model and the configuration, so the
least budget is known exactly: all of that, and one slot per layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pipeline.config import Config
from pipeline.console import size
from pipeline.cores import thread_count
from pipeline.dials import with_fewer
from pipeline.planner import devices
from pipeline.planner.budget import parse_budget
from pipeline.planner.drafting import PIECE, check_draft_model, draft_store, most_drafts
from pipeline.planner.machine import available_bytes
from pipeline.planner.need import Needs
from pipeline.planner.resolve import Resolved, resolve
from pipeline.ring import segments
from pipeline.ring.plan import BLOCK, BLOCKS, HOST, PANEL, ROWS_APART, TILE, Plan
from storage.codecs import CODECS
from storage.errors import BudgetError, ConfigError
from storage.manifest import RESIDENT
from storage.shadow import Shadow
from storage.store import Store

DEFAULT_WINDOW = 5  # tokens; the paper's k
FITS: Final = 0.6  # of the available memory that a ring takes without being asked
DEFAULT_SHARE: Final = 0.25  # of the FFN, where all of it is more than that
F32 = 4  # bytes

# Proportional set size of each process without what the plan's other parts count, in bytes. Measured
# on Linux 6.18, Python 3.11: on a tiny model compute 110 MiB, predictor 93 (30 for kind `all`), cache
# 30, prefetcher 31, supervisor 36; on OPT-6.7B's shape compute less than 120, predictor 93, cache 46,
# prefetcher 32, supervisor 83; on Falcon-7B's compute 130, supervisor 110 with its larger tokenizer.
BASES: Final = {
    "compute": 140 << 20,
    "predictor": 110 << 20,
    "cache": 50 << 20,
    "prefetcher": 40 << 20,
    "supervisor": 110 << 20,
}
# What llguidance takes for a tokenizer, and for a schema: 7.6 MB for the built-in model's 4,096 tokens, 45 MB
# for 49,152 of SmolLM2's, a few MB for a schema and its parser.
TOKEN, GRAMMAR = 1024, 16 << 20
PAGE_TABLES: Final = 512  # bytes that one byte of page tables maps: 8 for every 4 KiB
PINNED_PAGES: Final = 256  # the same for io_uring's table of registered buffers: 16 for every 4 KiB


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and how it came about. All sizes in bytes."""

    plan: Plan
    config: Config  # with nothing left open
    parts: dict[str, int]  # what holds how much
    budget: int | None  # None: no budget was given
    why: str = ""  # that share of the FFN, where nobody asked for it; for people
    by_need: bool = False  # the layers' slots are divided as a recorded trace needs them
    device: dict[str, int] = field(default_factory=dict)  # what holds how much of a torch device's memory
    bus_bytes: int = 0  # that a token brings over the bus at most

    @property
    def total(self) -> int:
        """Of the host's memory."""
        return sum(self.parts.values())

    @property
    def streamed_bytes(self) -> int:
        """What a token reads when every neuron is needed: all bundles without a slot."""
        plan = self.plan
        return (sum(plan.units) - plan.total_slots) * plan.stride

    @property
    def lines(self) -> list[str]:
        """The division of the memory, for people."""
        plan = self.plan
        resident = plan.total_slots / sum(plan.units)
        within = f" of {size(self.budget)}" if self.budget is not None else ""
        head = f"memory: {size(self.total)}{within}; {resident:.1%} of the FFN in {plan.total_slots:,} slots"
        if self.by_need:
            head += f", {min(plan.slots)} to {max(plan.slots)} a layer by need"
        return [
            head,
            *([self.why] if self.why else []),
            *_listed(self.parts),
            *self._device_lines(),
        ]

    def _device_lines(self) -> list[str]:
        if not self.device:
            return []
        kind, plan = self.config.compute.device, self.plan
        shared = " of that" if kind in HOST else ""
        return [
            f"device {kind}: {size(sum(self.device.values()))}{shared}; {plan.mirrored:,} slots lie there, "
            f"too; at most {size(self.bus_bytes)} go over the bus a token",
            *_listed(self.device),
        ]


def _listed(parts: Mapping[str, int]) -> list[str]:
    return [f"  {name:<18}{size(value):>12}" for name, value in parts.items()]


def plan(store: Store, config: Config, available: int | None = None) -> PlanReport:
    """Resolve the configuration and divide the memory.

    Without a budget, `available` bytes decide what is kept; None: those that the machine has now.
    Raises BudgetError, naming the least that would do, when the budget is too small, and
    ConfigError for what cannot be.
    """
    check_draft_model(store, config)
    return divide(store, resolve(store, config), available)


def divide(store: Store, resolved: Resolved, available: int | None = None) -> PlanReport:
    """`plan`, of a configuration that was resolved before: as a store on paper's must be."""
    config, store = resolved.config, with_fewer(store, resolved.config)
    resolved = replace(resolved, device_bytes=devices.limit(store, config))
    budget = parse_budget(config.memory.budget, store)
    least = _report(store, resolved, _least_slots(store, config), budget)
    units = store.layout.units
    if budget is None:
        return _without_budget(store, resolved, available)
    if budget < least.total:
        raise BudgetError(
            f"a memory budget of {size(budget)} is too small for {store.manifest.name}: "
            f"the least that would do is {math.ceil(least.total / (1 << 20))}MiB"
        )
    if resolved.forecast.low:
        return least
    if config.cache.slots_per_layer or not (open_layers := len(units) - len(resolved.forecast.pinned)):
        return least
    each = math.ceil(store.layout.stride * (1 + 2 / PAGE_TABLES + 1 / PINNED_PAGES))
    spare = _affordable(budget - least.total, open_layers, each, least, resolved.device_bytes)
    alike = [slots + spare for slots in _least_slots(store, config)]
    return _by_need(store, resolved, _report(store, resolved, alike, budget))


def _affordable(room: int, layers: int, each: int, least: PlanReport, device_bytes: int | None) -> int:
    """Further slots a layer, of `each` bytes, for `room` bytes; a mirror in host memory takes of it, too."""
    if least.config.compute.device != "torch-cpu" or device_bytes is None:
        return room // (layers * each)
    mirror = device_bytes - sum(least.device.values())  # its most
    return max(room // (layers * (each + least.plan.stride)), (room - mirror) // (layers * each))


def _without_budget(store: Store, resolved: Resolved, available: int | None) -> PlanReport:
    """As many slots as the configuration says; where it does not, all that fit the machine, or a share."""
    cache, units = resolved.config.cache, store.layout.units
    if resolved.forecast.low:
        return _report(store, resolved, _floor(store), None)
    if cache.slots_per_layer:
        return _report(store, resolved, [cache.slots_per_layer] * len(units), None)
    share, why = cache.share, ""
    if share is None:
        whole = _report(store, resolved, units, None).total
        room = available_bytes() if available is None else available
        fits = whole <= FITS * room
        share = 1.0 if fits else DEFAULT_SHARE
        resolved = replace(resolved, config=resolved.config.replace(cache={"share": share}))
        why = (
            f"all of the FFN stays in memory, since {size(room)} are available"
            if fits
            else f"all of the FFN would take {size(whole)}, above {FITS:.0%} of the {size(room)} available; "
            "--memory allows it"
        )
    report = _report(store, resolved, [round(share * count) for count in units], None)
    return replace(_by_need(store, resolved, report), why=why)


def _by_need(store: Store, resolved: Resolved, alike: PlanReport) -> PlanReport:
    """The same slots divided as recorded needs say; `alike` without them or where that is no use."""
    pinned, slots = resolved.forecast.pinned, alike.plan.slots
    if resolved.forecast.kind != "router" or not resolved.config.cache.by_need:
        return alike
    needs = Needs.of(store)
    if needs is None:
        return alike
    floors = [
        count if layer in pinned else min(count, least)
        for layer, (count, least) in enumerate(zip(slots, _floor(store), strict=True))
    ]
    divided = needs.instead_of(slots, floors)
    if divided == list(slots):
        return alike
    return replace(_report(store, resolved, divided, alike.budget), by_need=True)


def least(store: Store, config: Config) -> PlanReport:
    """The smallest plan there is for a configuration, whatever its budget. Raises ConfigError."""
    return least_of(store, resolve(store, config))


def least_of(store: Store, resolved: Resolved) -> PlanReport:
    """`least`, of a configuration that was resolved before."""
    config, store = resolved.config, with_fewer(store, resolved.config)
    return _report(store, resolved, _least_slots(store, config), None)


def most(store: Store, config: Config) -> PlanReport:
    """The plan that holds every neuron, whatever the budget. Raises ConfigError."""
    return most_of(store, resolve(store, config))


def most_of(store: Store, resolved: Resolved) -> PlanReport:
    """`most`, of a configuration that was resolved before."""
    return _report(store, resolved, store.layout.units, None)


def _floor(store: Store) -> list[int]:
    """The slots that each layer has at least: one, and of experts as many as a token needs.

    With fewer, a layer's experts would drive each other out within a token.
    """
    routers = (layer.ffn.router for layer in store.architecture.layers)
    return [router.top_k if router else 1 for router in routers]


def _least_slots(store: Store, config: Config) -> list[int]:
    """Raises ConfigError for a number of slots with which a token's experts cannot stay together."""
    asked, floor = config.cache.slots_per_layer, _floor(store)
    if asked and asked < max(floor):
        raise ConfigError(
            f"cache.slots_per_layer {asked} is below the {max(floor)} experts that a token needs of a layer"
        )
    return [asked] * len(floor) if asked else floor


def _report(store: Store, resolved: Resolved, slots: Sequence[int], budget: int | None) -> PlanReport:
    """The plan with so many `slots` in each layer that is not pinned: at least its floor, at most all."""
    config, forecast, units = resolved.config, resolved.forecast, store.layout.units
    divided = Plan(
        d_model=store.architecture.d_model,
        units=units,
        stride=store.layout.stride,
        slots=tuple(
            count if layer in forecast.pinned else min(count, max(least, slots[layer]))
            for layer, (count, least) in enumerate(zip(units, _floor(store), strict=True))
        ),
        staging=staging_slots(config.prefetcher.staging, store.layout.stride, store.layout.most_units),
        context=config.compute.context,
        hidden_rows=config.cache.window or DEFAULT_WINDOW,
        forecast=forecast,
        cache_dtype=config.compute.kv_cache,
    )
    divided = replace(divided, drafts=most_drafts(store, config, divided))
    held = devices.held(store, config, divided)
    devices.check(store, sum(held.values()), resolved.device_bytes)
    kind = config.compute.device
    divided = replace(
        divided,
        mirrored=devices.mirrored(divided, sum(held.values()), resolved.device_bytes),
        device_bytes=None if kind in HOST else resolved.device_bytes,
    )
    if held:
        held["mirror"] = divided.mirrored * divided.stride
    parts = _parts(store, resolved, divided, held)
    bus = devices.bus_bytes(store, divided) if held else 0
    return PlanReport(divided, config, parts, budget, device=held, bus_bytes=bus)


def staging_slots(size_bytes: int, stride: int, most: int) -> int:
    """Units of one staging half: `most`, or whole blocks, so that kernels see them, where there is room."""
    count = max(1, size_bytes // stride)
    if count > BLOCK:
        count -= count % BLOCK
    return min(count, most)


def _parts(store: Store, resolved: Resolved, divided: Plan, device: Mapping[str, int]) -> dict[str, int]:
    """In host memory. `device`: what lies in that of a torch device."""
    config = resolved.config
    drafting = draft_store(config)
    shared = segments.sizes(divided)
    resident = store.manifest.files[RESIDENT].bytes
    copy = Shadow.open(store).bytes if divided.forecast.shadowed else 0
    mapped = resident + copy + 2 * sum(shared.values())  # the segments by compute and by the prefetcher
    tables = mapped // PAGE_TABLES + shared["bundles"] // PINNED_PAGES
    staging = 2 * divided.staging * divided.stride
    processes = sum(BASES.values()) + devices.TORCH.get(config.compute.device, 0)
    own = {"resident weights": resident, "KV cache": _cache_bytes(store, divided)}
    if device:
        own = dict(device) if config.compute.device in HOST else devices.on_host(store, config, divided)
    else:
        own["activations"] = _activation_bytes(store, config, divided)
    return {
        **own,
        "predictors": _held_by_predictor(store, resolved, divided),
        **({"shadow": copy} if divided.forecast.shadowed else {}),
        "slots": shared.pop("bundles") - staging,
        "staging": staging,
        "tables": sum(shared.values()),
        **({"draft model": _draft_bytes(drafting, config, divided)} if drafting else {}),
        **({"structured output": _constraint_bytes(store)} if config.compute.structured else {}),
        "processes": processes,
        "page tables": tables,
    }


def _cache_bytes(store: Store, divided: Plan) -> int:
    layers = (layer.attention for layer in store.architecture.layers)
    heads = sum(layer.kv_heads * layer.head_dim for layer in layers)
    return 2 * CODECS[divided.cache_dtype].size(divided.context * heads)


def _draft_bytes(store: Store, config: Config, divided: Plan) -> int:
    """All of a draft model, which compute holds, and its scratch."""
    weights = store.manifest.files[RESIDENT].bytes + store.layout.total_bytes
    scratch = _activation_bytes(store, config, replace(divided, context=PIECE))
    return weights + weights // PAGE_TABLES + _cache_bytes(store, divided) + scratch


def _activation_bytes(store: Store, config: Config, divided: Plan) -> int:
    """Compute's scratch at its largest, the prefill of a full context, all float32.

    Per token: seven rows of d_model (residual, norms, outputs of attention and FFN), queries, keys
    and values before and after rotation, the input of a product in panels, and the FFN activations of a few
    blocks of units. Per thread: a product of some rows with the prompt, or the scores of fewer tokens; in a
    gated FFN two products of one block at once, rectified; of experts inputs, outputs and products of as many
    tokens as are computed or wait to be summed.
    """
    a = store.architecture
    threads = thread_count(config.compute.threads)
    heads = max(layer.attention.projected for layer in a.layers)
    activations = max(
        2 * ffn.shared.width
        if ffn.shared
        else 0
        if ffn.router
        else min(ffn.neurons, BLOCKS * max(BLOCK, ffn.width))
        for ffn in (layer.ffn for layer in a.layers)
    )
    per_token = 7 * a.d_model + 2 * heads + max(a.d_model, heads) + activations
    per_thread = TILE * divided.context
    if any(layer.ffn.kind == "gated" for layer in a.layers):
        per_thread += 2 * BLOCK * divided.context
    if a.mixture:
        width = max(layer.ffn.width for layer in a.layers)
        per_thread += ROWS_APART * (2 * a.d_model + width)
    tokens = divided.context + PANEL - 1
    return (tokens * per_token + threads * per_thread + 2 * a.vocabulary) * F32


def _constraint_bytes(store: Store) -> int:
    """Of compute's tree of tokens, and of the parser of one answer's form."""
    return GRAMMAR + TOKEN * store.architecture.vocabulary


def _held_by_predictor(store: Store, resolved: Resolved, divided: Plan) -> int:
    if divided.forecast.kind == "lowrank":
        return resolved.predictor_bytes
    if divided.forecast.kind == "router":  # as compute has them, with the scales of guesses
        routed = (layer.ffn for layer in store.architecture.layers if layer.ffn.router)
        return sum((ffn.units + 1) * store.architecture.d_model * F32 for ffn in routed)
    if divided.forecast.kind == "oracle":
        layers = zip(store.layout.layers, store.architecture.layers, strict=True)
        return sum(
            part.units * part.unit.row_bytes(role) for part, layer in layers for role in layer.ffn.deciding
        )
    return 0
