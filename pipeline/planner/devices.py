"""The memory of a torch device: what it holds, how much of it there is, and what goes over the bus."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Final

from pipeline.config import Config
from pipeline.console import size
from pipeline.launch import ask_module
from pipeline.planner.budget import parse_budget
from pipeline.ring.plan import HOST, QUERIES, WIDENED, Plan
from pipeline.status import waiting
from storage.codecs import CODECS
from storage.errors import BudgetError, ConfigError
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors

PROBE = "workers.compute.torch.probe"
PROBE_SECONDS = 120.0  # torch and a driver may take long on a cold disk
FREE: Final = 0.9  # of a GPU's free memory, where nobody says how much
F32 = 4  # bytes

# What torch adds to compute's process. torch-cpu: measured, 223 MiB resident, 217 proportional, after its
# first product. A GPU's driver and context lie in host memory, too.
TORCH: Final = {"torch-cpu": 240 << 20, "cuda": 1200 << 20, "mps": 500 << 20}
BUFFERS: Final = {"cuda": 4 * (16 << 20)}  # page-locked memory that units go through


@dataclass(frozen=True, slots=True)
class Found:
    """A GPU; sizes in bytes."""

    name: str
    free: int
    total: int


@cache
def probe(kind: str) -> Found:
    """The GPU that torch finds. Raises ConfigError where there is none."""
    try:
        with waiting("asking torch for a device"):
            done = ask_module(PROBE, kind, seconds=PROBE_SECONDS)
        said = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise ConfigError(f"compute.device is {kind}, and torch cannot be asked for one") from error
    if "missing" in said:
        raise ConfigError(f"compute.device is {kind}, and {said['missing']}: take cpu or torch-cpu")
    return Found(**said)


def limit(store: Store, config: Config) -> int | None:
    """Bytes that may be taken of the device's memory; None: the CPU's, or as few as will do.

    Raises ConfigError for a device that is not there, BudgetError for more than it has.
    """
    kind, text = config.compute.device, config.compute.device_memory
    if kind == "cpu":
        if text:
            raise ConfigError("compute.device_memory is for another compute.device than cpu")
        return None
    asked = parse_budget(text, store, "compute.device_memory")
    if kind in HOST:
        return asked
    found = probe(kind)
    if asked is None:
        return int(FREE * found.free)
    if asked > found.free:
        raise BudgetError(
            f"a device memory of {size(asked)} is more than the {size(found.free)} that {found.name} has free"
        )
    return asked


def held(store: Store, config: Config, plan: Plan) -> dict[str, int]:
    """What lies in the device's memory besides mirrored slots, in bytes; {} for the CPU's own kernels."""
    if config.compute.device == "cpu":
        return {}
    layers = store.architecture.layers
    heads = sum(layer.attention.kv_heads * layer.attention.head_dim for layer in layers)
    return {
        "resident weights": store.manifest.files[RESIDENT].bytes,
        "KV cache": 2 * CODECS[plan.cache_dtype].size(plan.context * heads),
        "activations": _scratch(store, plan),
    }


def mirrored(plan: Plan, held_bytes: int, limit_bytes: int | None) -> int:
    """Slots, those of the first layers, whose units stay on the device too."""
    room = 0 if limit_bytes is None else limit_bytes - held_bytes
    return min(plan.total_slots, max(0, room) // max(1, plan.stride))


def check(store: Store, held_bytes: int, limit_bytes: int | None) -> None:
    """Raises BudgetError, naming the least that would do."""
    if limit_bytes is not None and held_bytes > limit_bytes:
        raise BudgetError(
            f"a device memory of {size(limit_bytes)} is too small for {store.manifest.name}: "
            f"the least that would do is {math.ceil(held_bytes / (1 << 20))}MiB"
        )


def on_host(store: Store, config: Config, plan: Plan) -> dict[str, int]:
    """What a GPU's ring holds in host memory instead: what weights and units go through."""
    file = Tensors(store.path / RESIDENT)
    model = store.architecture
    return {
        "loading": max((place.bytes for place in file.places.values()), default=0),
        "page-locked": BUFFERS.get(config.compute.device, 0),
        "activations": F32 * 2 * (plan.context * model.d_model + model.vocabulary),
    }


def bus_bytes(store: Store, plan: Plan) -> int:
    """The most that one token brings over the bus, once slots are full: units that are not mirrored."""
    total = 0
    for index, (units, layer) in enumerate(zip(plan.units, store.architecture.layers, strict=True)):
        own = min(plan.slots[index], max(0, plan.mirrored - plan.first_slot(index)))
        wanted = layer.ffn.router.top_k if plan.forecast.routed and layer.ffn.router else units
        total += min(wanted, units - own) * plan.stride
    return total


def _scratch(store: Store, plan: Plan) -> int:
    """Of a prompt as long as the context: one layer's units, what is widened, and activations."""
    model = store.architecture
    units = max(layer.bytes for layer in store.layout.layers) + 4 * plan.staging * plan.stride
    widened = 3 * WIDENED
    neurons = 0
    for layer in model.layers:
        ffn = layer.ffn
        if ffn.router is not None:
            widened = max(widened, ffn.router.top_k * (2 * ffn.width * model.d_model * F32 + plan.stride))
            neurons = max(neurons, 3 * ffn.width)
        else:
            neurons = max(neurons, 3 * min(ffn.neurons, max(1, WIDENED // (2 * F32 * model.d_model))))
    projected = max(layer.attention.projected for layer in model.layers)
    heads = max(layer.attention.heads for layer in model.layers)
    per_token = 7 * model.d_model + 3 * projected + neurons + 2 * heads * QUERIES
    return units + widened + F32 * (plan.context * per_token + 2 * model.vocabulary)
