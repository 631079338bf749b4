"""Where checkpoints keep a mixture's tensors: routers, experts, shared experts and dense layers.

Experts are published one by one, or stacked in one tensor a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage import architecture as canonical
from storage.architecture import Architecture, Ffn, Router, Shared
from storage.errors import UnsupportedModel
from storage.families.family import Resident, Settings, Source, copied, layer_count, number
from storage.layout import ROLES, Role

PROJECTIONS: dict[Role, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True, slots=True)
class Names:
    """What a family calls them, below `layers.N`. Projections without their `.weight`."""

    block: str = "mlp"  # of a layer with experts
    router: str = "gate"
    roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of one expert
    stacks: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")  # whole names; gate rows first
    biases: bool = False  # of the router, and of every expert's projections
    shared: str = "shared_expert"
    switch: str = "shared_expert_gate"


def experts(config: Settings, router: Router, width: int, dense: Ffn, shared: Shared | None = None) -> Ffn:
    """An FFN of experts with `dense`'s activation. Raises UnsupportedModel for more chosen than there are."""
    count = number(config, "num_local_experts", config.get("num_experts"))
    if router.top_k > count:
        raise UnsupportedModel(f"config.json: {router.top_k} experts a token of {count} are not supported")
    return Ffn("gated", count, width, dense.activation, router=router, shared=shared)


def dense(ffn: Ffn) -> Ffn:
    """The same FFN as a mixture's layer: resident, with nothing on flash."""
    return Ffn(ffn.kind, 0, 1, ffn.activation, shared=Shared(ffn.neurons))


def sparse_layers(config: Settings) -> list[bool]:
    """Which layers have experts, by `mlp_only_layers` and `decoder_sparse_step`. Raises UnsupportedModel."""
    only: Any = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(index) is int for index in only):
        raise UnsupportedModel(f"config.json: mlp_only_layers must be numbers of layers, not {only!r:.60}")
    step, count = number(config, "decoder_sparse_step", 1), layer_count(config)
    found = [index not in only and (index + 1) % step == 0 for index in range(count)]
    if not any(found):
        raise UnsupportedModel("config.json: a mixture of experts without a layer that has experts")
    return found


def resident(names: Names, model: Architecture, index: int) -> list[Resident]:
    """A layer's router, and what it has for every token."""
    ffn, width, below = model.layers[index].ffn, model.d_model, f"layers.{index}"
    parts: list[Resident] = []
    where = f"{below}.mlp"
    if ffn.router is not None:
        where = f"{below}.{names.block}.{names.shared}"
        source = f"{below}.{names.block}.{names.router}.weight"
        parts.append(copied(canonical.layer(index, "router.weight"), source, ffn.units, width))
        parts += _biases(names, ffn, index, width) if names.biases else ()
    if ffn.shared is None:
        return parts
    for role in ROLES[ffn.kind]:
        shape = (width, ffn.shared.width) if role == "down" else (ffn.shared.width, width)
        name = canonical.layer(index, f"shared_{role}.weight")
        parts.append(copied(name, f"{where}.{PROJECTIONS[role]}.weight", *shape))
    if ffn.shared.gated:
        source = f"{below}.{names.block}.{names.switch}.weight"
        parts.append(copied(canonical.layer(index, "shared_switch.weight"), source, 1, width))
    return parts


def _biases(names: Names, ffn: Ffn, index: int, width: int) -> list[Resident]:
    """The router's, and the experts' as one vector for each role, expert after expert."""
    block = f"layers.{index}.{names.block}"
    parts = [copied(canonical.layer(index, "router.bias"), f"{block}.{names.router}.bias", ffn.units)]
    for role, name in zip(ROLES["gated"], names.roles, strict=True):
        size = width if role == "down" else ffn.width
        source = Source(f"{block}.experts.{name}.bias", (ffn.units, size))
        place = canonical.layer(index, f"{role}.bias")
        parts.append(Resident(place, (ffn.units * size,), (source,), lambda arrays: arrays[0].reshape(-1)))
    return parts


def sources(
    names: Names, model: Architecture, index: int, expert: int
) -> tuple[Mapping[Role, Source], Mapping[Role, Source]]:
    """One expert's matrices, in each of the forms in which they are published."""
    ffn, width = model.layers[index].ffn, model.d_model
    block, neurons, count = f"layers.{index}.{names.block}", ffn.width, ffn.units
    shapes = ((neurons, width), (neurons, width), (width, neurons))
    alone = {
        role: Source(f"{block}.experts.{expert}.{name}.weight", shape)
        for role, name, shape in zip(ROLES["gated"], names.roles, shapes, strict=True)
    }
    both, down = (f"{block}.{name}" for name in names.stacks)
    lines, start = 2 * neurons * count, 2 * neurons * expert
    stacked: dict[Role, Source] = {
        "gate": Source(both, shapes[0], start, lines, count),
        "up": Source(both, shapes[1], start + neurons, lines, count),
        "down": Source(down, shapes[2], width * expert, width * count, count),
    }
    return alone, stacked
