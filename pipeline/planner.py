"""Divides the memory: what one ring holds, how large each part is, and whether a budget allows it.

Slots take what is left. Everything else is decided by the model and the configuration, so the
least budget is known exactly: all of that, and one slot per layer.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import time
from dataclasses import dataclass
from typing import Final

from pipeline.config import Config, Model
from pipeline.console import size
from pipeline.cores import thread_count
from pipeline.ring import segments
from pipeline.ring.plan import Plan
from storage.codecs import CODECS
from storage.errors import BudgetError, ConfigError, StoreError
from storage.manifest import BUNDLES, RESIDENT
from storage.store import Store
from storage.tensors import Tensors

DEFAULT_CONTEXT = 2048  # tokens
DEFAULT_WINDOW = 5  # tokens; the paper's k
KERNEL_BLOCK = 256  # neurons; staging halves are a multiple of it, so that kernels see whole blocks
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
PAGE_TABLES: Final = 512  # bytes that one byte of page tables maps: 8 for every 4 KiB
PINNED_PAGES: Final = 256  # the same for io_uring's table of registered buffers: 16 for every 4 KiB


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and how it came about. All sizes in bytes."""

    plan: Plan
    parts: dict[str, int]  # what holds how much
    budget: int | None  # None: no budget was given

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def streamed_bytes(self) -> int:
        """What a token reads when every neuron is needed: all bundles without a slot."""
        plan = self.plan
        return sum((plan.d_ff - slots) * plan.stride for slots in plan.slots)

    @property
    def lines(self) -> list[str]:
        """The division of the memory, for people."""
        plan = self.plan
        resident = plan.total_slots / (plan.layers * plan.d_ff)
        within = f" of {size(self.budget)}" if self.budget is not None else ""
        head = f"memory: {size(self.total)}{within}; {resident:.1%} of the FFN in {plan.total_slots:,} slots"
        return [head, *(f"  {name:<18}{size(value):>12}" for name, value in self.parts.items())]


def resolve(store: Store, config: Config) -> Config:
    """The configuration with everything that `auto` and 0 stand for decided.

    Raises ConfigError for what this model cannot do.
    """
    limit = store.architecture.max_positions
    context = config.compute.context or min(DEFAULT_CONTEXT, limit)
    if context > limit:
        raise ConfigError(f"a context of {context:,} tokens is beyond the model's limit of {limit:,}")
    kind, name = config.predictor.kind, config.model.predictor
    has_predictors = store.predictors(name).is_file()
    if not has_predictors and (kind == "lowrank" or (kind == "auto" and name != Model().predictor)):
        others = ", ".join(sorted(file.stem for file in store.predictors(name).parent.glob("*.safetensors")))
        raise ConfigError(
            f"{store.manifest.name} has no predictors named {name!r}{f', only {others}' if others else ''}: "
            f"make them with `run.py train-predictor --store {store.path} --name {name} --text FILE`, "
            "or choose another model.predictor or predictor.kind"
        )
    if kind == "auto":
        kind = "lowrank" if store.architecture.sparse and has_predictors else "all"
    if kind == "oracle" and not store.architecture.sparse:
        raise ConfigError(
            "predictor.kind oracle needs a ReLU model, "
            f"and {store.manifest.name} has {store.architecture.activation}"
        )
    if config.predictor.cache_aware and kind != "lowrank":
        raise ConfigError(f"predictor.cache_aware needs trained predictors, and predictor.kind is {kind}")
    refine = _refines(store, config, kind)
    if kind == "oracle" and config.predictor.lookahead and not refine:
        raise ConfigError("predictor.kind oracle needs predictor.lookahead 0 or predictor.refine true")
    pinned_layers(store, config)
    return config.replace(predictor={"kind": kind, "refine": refine}, compute={"context": context})


def _refines(store: Store, config: Config, kind: str) -> bool:
    """Whether to refine. Raises ConfigError where the predictors do not fit the configuration."""
    wanted, lookahead = config.predictor.refine, config.predictor.lookahead
    if kind != "lowrank":
        return wanted is not False
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
    return refine


def predicts_early(store: Store, config: Config) -> bool:
    """Whether a resolved configuration's predictors want hidden states before attention."""
    if config.predictor.kind != "lowrank":
        return False
    return Tensors(store.predictors(config.model.predictor)).metadata.get("early") == "true"


def plan(store: Store, config: Config) -> PlanReport:
    """Divide the memory for a resolved configuration.

    Raises BudgetError, naming the least that would do, when the budget is too small, and
    ConfigError for a budget or a layer that cannot be.
    """
    config = resolve(store, config)
    budget = parse_budget(config.memory.budget, store)
    pinned = pinned_layers(store, config)
    least = _report(store, config, pinned, _least_slots(store, config), budget)
    if budget is None:
        wanted = config.cache.slots_per_layer or round(config.cache.share * store.layout.most_units)
        return _report(store, config, pinned, wanted, None)
    if budget < least.total:
        raise BudgetError(
            f"a memory budget of {size(budget)} is too small for {store.manifest.name}: "
            f"the least that would do is {math.ceil(least.total / (1 << 20))}MiB"
        )
    if config.cache.slots_per_layer or not (open_layers := len(store.layout.layers) - len(pinned)):
        return least
    stride = store.layout.stride
    each = math.ceil(stride * (1 + 2 / PAGE_TABLES + 1 / PINNED_PAGES))
    spare = (budget - least.total) // (open_layers * each)
    return _report(store, config, pinned, _least_slots(store, config) + spare, budget)


def least(store: Store, config: Config) -> PlanReport:
    """The smallest plan there is for a configuration, whatever its budget. Raises ConfigError."""
    config = resolve(store, config)
    return _report(store, config, pinned_layers(store, config), _least_slots(store, config), None)


def most(store: Store, config: Config) -> PlanReport:
    """The plan that holds every neuron, whatever the budget. Raises ConfigError."""
    config = resolve(store, config)
    return _report(store, config, pinned_layers(store, config), store.layout.most_units, None)


def _least_slots(store: Store, config: Config) -> int:
    return config.cache.slots_per_layer or 1


def _report(
    store: Store, config: Config, pinned: frozenset[int], slots: int, budget: int | None
) -> PlanReport:
    """The plan with `slots` in every layer that is not pinned."""
    layout = store.layout
    slots = max(1, min(layout.most_units, slots))
    divided = Plan(
        layers=len(layout.layers),
        d_model=store.architecture.d_model,
        d_ff=layout.most_units,
        stride=layout.stride,
        slots=tuple(layout.most_units if layer in pinned else slots for layer in range(len(layout.layers))),
        staging=staging_slots(config.prefetcher.staging, layout.stride, layout.most_units),
        context=config.compute.context,
        hidden_rows=config.cache.window or DEFAULT_WINDOW,
        lookahead=config.predictor.lookahead,
        pinned=pinned,
        cache_dtype=config.compute.kv_cache,
        early=predicts_early(store, config),
    )
    return PlanReport(divided, _parts(store, config, divided), budget)


def staging_slots(size_bytes: int, stride: int, d_ff: int) -> int:
    """Bundles of one staging half: whole blocks where there is room for one, at most a layer."""
    count = max(1, size_bytes // stride)
    if count > KERNEL_BLOCK:
        count -= count % KERNEL_BLOCK
    return min(count, d_ff)


def _parts(store: Store, config: Config, divided: Plan) -> dict[str, int]:
    architecture = store.architecture
    shared = segments.sizes(divided)
    resident = store.manifest.files[RESIDENT].bytes
    mapped = resident + 2 * sum(shared.values())  # the segments by compute and by the prefetcher
    tables = mapped // PAGE_TABLES + shared["bundles"] // PINNED_PAGES
    staging = 2 * divided.staging * divided.stride
    heads = sum(layer.attention.kv_heads * layer.attention.head_dim for layer in architecture.layers)
    cached = 2 * CODECS[divided.cache_dtype].size(divided.context * heads)
    return {
        "resident weights": resident,
        "KV cache": cached,
        "predictors": _held_by_predictor(store, config),
        "slots": shared.pop("bundles") - staging,
        "staging": staging,
        "tables": sum(shared.values()),
        "activations": _activation_bytes(store, config, divided),
        "processes": sum(BASES.values()),
        "page tables": tables,
    }


def _activation_bytes(store: Store, config: Config, divided: Plan) -> int:
    """Compute's scratch at its largest, the prefill of a full context, all float32.

    Per token: seven rows of d_model (residual, norms, outputs of attention and FFN), queries, keys
    and values before and after rotation, and the FFN activations of eight blocks of neurons. Per
    thread: a widened tile of weights and its product with the prompt, or the scores of half as many tokens.
    """
    a = store.architecture
    threads = thread_count(config.compute.threads)
    heads = max(layer.attention.projected for layer in a.layers)
    per_token = 7 * a.d_model + 2 * heads + min(divided.d_ff, 8 * KERNEL_BLOCK)
    per_thread = 2 * KERNEL_BLOCK * (a.d_model + divided.context)
    return (divided.context * per_token + threads * per_thread + 2 * a.vocabulary) * F32


def predictor_bytes(store: Store, config: Config) -> int:
    """Size of the chosen predictors' file; 0 when there is none."""
    try:
        return store.predictors(config.model.predictor).stat().st_size
    except FileNotFoundError:
        return 0


def _held_by_predictor(store: Store, config: Config) -> int:
    if config.predictor.kind == "lowrank":
        return predictor_bytes(store, config)
    if config.predictor.kind == "oracle":
        return sum(one.units * one.unit.row_bytes("up") for one in store.layout.layers)
    return 0


def pinned_layers(store: Store, config: Config) -> frozenset[int]:
    """Pinned layers by their number from the front. Raises ConfigError."""
    layers = len(store.layout.layers)
    for layer in config.predictor.pinned_layers:
        if not -layers <= layer < layers:
            raise ConfigError(f"predictor.pinned_layers names layer {layer}, and the model has {layers}")
    return frozenset(layer % layers for layer in config.predictor.pinned_layers)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B|B|)", re.IGNORECASE)
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_budget(text: str, store: Store) -> int | None:
    """Bytes of `7GiB`, `50%` (of the checkpoint) or a sum such as `50%+1GiB`; None for ''."""
    if not text.strip():
        return None
    total = 0.0
    for term in text.split("+"):
        match = _SIZE.fullmatch(term.strip())
        if match is None:
            raise ConfigError(f"memory.budget takes a size such as 7GiB or 50%, not {text!r}")
        number, unit = float(match[1]), match[2].upper()
        total += number / 100 * checkpoint_bytes(store) if unit == "%" else number * _UNITS[unit]
    if not math.isfinite(total):
        raise ConfigError(f"memory.budget cannot be as large as {text[:20]}…")
    return int(total)


def checkpoint_bytes(store: Store) -> int:
    """The model's weights without padding: resident tensors and FFN matrices."""
    return store.manifest.files[RESIDENT].bytes + store.layout.useful_bytes


def why_dense(store: Store, config: Config) -> str:
    """The reason for kind `all`, to stand after the model's name."""
    if not store.architecture.sparse:
        return f"is not sparse ({store.architecture.activation})"
    if predictor_bytes(store, config):
        return "runs with every neuron, as asked"
    return "runs without predictors (train-predictor makes them)"


PROBE_SECONDS = 0.15
PROBE_READ = 4 << 20  # bytes; the kernel keeps several requests of one such read in flight


def probe_rate(store: Store) -> float:
    """Bytes a second that the store's disk delivers in large sequential reads, from a short try."""
    total = store.layout.total_bytes
    descriptor = _open_direct(store.path / BUNDLES)
    done = position = 0
    started = time.perf_counter()
    try:
        with mmap.mmap(-1, PROBE_READ) as buffer:  # page-aligned, as direct I/O asks
            while (elapsed := time.perf_counter() - started) < PROBE_SECONDS:
                done += os.preadv(descriptor, [buffer], position)
                position += PROBE_READ
                if position >= total:
                    position = 0
    finally:
        os.close(descriptor)
    return max(1.0, done / elapsed)


def _open_direct(path: os.PathLike[str]) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system without direct I/O
        return os.open(path, os.O_RDONLY)
