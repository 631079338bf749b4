"""A store's layers with experts, dense, over all tokens of one sequence; one expert in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage import architecture as canonical
from storage.architecture import Ffn
from storage.codecs import CODECS, F32, widen
from storage.layout import Role
from storage.manifest import BUNDLES, RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.synthesis import block
from workers.routing import Routing, route


@dataclass(frozen=True, slots=True)
class DenseMixture:
    """Reads what each call needs."""

    store: Store
    resident: Tensors

    @classmethod
    def of(cls, store: Store) -> DenseMixture:
        return cls(store, Tensors(store.path / RESIDENT))

    def embedded(self, tokens: list[int]) -> Tensor:
        """The first layer's input, [tokens, d_model]."""
        name = canonical.EMBED
        place, model = self.resident.place(name), self.store.architecture
        row = place.bytes // model.vocabulary
        lines = np.memmap(
            self.resident.path, np.uint8, "r", offset=place.offset, shape=(model.vocabulary, row)
        )
        found = np.ascontiguousarray(lines[np.array(tokens)]).view(CODECS[place.dtype].carrier)
        return torch.from_numpy(widen(found, place.dtype)) * model.embedding_scale

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's resident tensors as `block` names them."""
        prefix = canonical.layer(index, "")
        return {
            name.removeprefix(prefix): self.tensor(name)
            for name in self.resident.names
            if name.startswith(prefix)
        }

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(widen(self.resident.read(name), self.resident.dtype(name)))

    def expert(self, layer: int, position: int) -> dict[Role, F32]:
        """gate and up [width, d_model], down [d_model, width], of the unit at a position of the file."""
        part = self.store.layout.layers[layer]
        memory = np.fromfile(
            self.store.path / BUNDLES, np.uint8, part.unit.stride, offset=part.offset(position)
        )
        return {row.role: part.unit.view(memory[None], row.role).widened() for row in part.unit.rows}

    def ffn(self, layer: int, tensors: dict[str, Tensor], f: Tensor, routing: Routing | None) -> Tensor:
        """Of the FFN's input f [tokens, d_model] the output."""
        ffn, made = self.store.architecture.layers[layer].ffn, torch.zeros_like(f)
        if routing is not None:
            positions = self.store.positions()
            for expert in np.unique(routing.ids).tolist():
                position = expert if positions is None else int(positions[layer][expert])
                rows, places = np.nonzero(routing.ids == expert)
                some, weights = torch.from_numpy(rows), torch.from_numpy(routing.weights[rows, places])
                matrices = {role: torch.from_numpy(one) for role, one in self.expert(layer, position).items()}
                biases = {
                    role: tensors[f"{role}.bias"].view(ffn.units, -1)[expert]
                    for role in matrices
                    if f"{role}.bias" in tensors
                }
                made[some] += weights[:, None] * _gated(ffn, matrices, biases, f[some])
        if ffn.shared is not None:
            shared: dict[Role, Tensor] = {
                role: tensors[f"shared_{role}.weight"] for role in ("gate", "up", "down")
            }
            brought = _gated(ffn, shared, {}, f)
            if ffn.shared.gated:
                brought = brought * torch.sigmoid(f @ tensors["shared_switch.weight"].T)
            made += brought
        return made


def _gated(ffn: Ffn, matrices: dict[Role, Tensor], biases: dict[Role, Tensor], f: Tensor) -> Tensor:
    def product(role: Role, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, matrices[role], biases.get(role))

    return product("down", block.activated(ffn, {"gate": product("gate", f), "up": product("up", f)}))


def routed(ffn: Ffn, tensors: dict[str, Tensor], f: Tensor) -> Routing | None:
    """The experts that a layer's router chooses for f [tokens, d_model]; None where it has no router."""
    return None if ffn.router is None else route(ffn.router, router_logits(tensors, f))


def router_logits(tensors: dict[str, Tensor], f: Tensor) -> F32:
    """[tokens, experts]."""
    logits: F32 = torch.nn.functional.linear(f, tensors["router.weight"], tensors.get("router.bias")).numpy()
    return logits
