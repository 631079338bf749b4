"""A model's tensors in float32, a layer at a time, from a checkpoint or from a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage import architecture as canonical
from storage.architecture import Architecture
from storage.checkpoint import Checkpoint
from storage.codecs import CODECS, FLOATS
from storage.convert.conversion import Conversion, check
from storage.layout import DEFAULT_ALIGNMENT
from storage.manifest import MANIFEST, RESIDENT
from storage.resident import built
from storage.store import Store
from storage.tensors import Tensors

FIRST = (canonical.EMBED, canonical.POSITIONS, canonical.PROJECT_IN)


class Weights(Protocol):
    """Where the dense reference takes its tensors from."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def name(self) -> str: ...

    @property
    def synthetic(self) -> bool: ...

    def first(self, tokens: Tensor) -> dict[str, Tensor]:
        """What `block.embedded` needs; of the embedding, the rows of `tokens` in their order."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors as `block` names them."""


def open_weights(path: Path) -> Weights:
    """Raises StoreError or CheckpointError for what is neither."""
    if (path / MANIFEST).is_file():
        return StoreWeights(Store.open(path))
    return CheckpointWeights(check(Checkpoint.open(path), DEFAULT_ALIGNMENT))


def _widened(array: npt.NDArray[Any], dtype: str) -> Tensor:
    """An array of the carrier type as float32."""
    if dtype not in FLOATS:
        return torch.from_numpy(CODECS[dtype].widen(array))
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if dtype == "float32" else tensor.view(getattr(torch, dtype)).float()


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """Tensors of a Hugging Face checkpoint, in the store's row order."""

    conversion: Conversion

    @property
    def architecture(self) -> Architecture:
        return self.conversion.architecture

    @property
    def name(self) -> str:
        return self.conversion.checkpoint.path.resolve().name

    @property
    def synthetic(self) -> bool:
        return "synthetic" in self.conversion.checkpoint.config

    def first(self, tokens: Tensor) -> dict[str, Tensor]:
        return self._read(lambda name: name in FIRST, tokens)

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = canonical.layer(index, "")
        named = self._read(lambda name: name.startswith(prefix), None)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
        for role, source in self.conversion.family.ffn(self.architecture, index).items():
            codec = self.conversion.layout.layers[index].unit.codec(role)
            tensors[f"{role}.weight"] = _widened(self.conversion.read(source), codec.name)
        self.conversion.checkpoint.release()
        return tensors

    def _read(self, wanted: Any, tokens: Tensor | None) -> dict[str, Tensor]:
        tensors = {}
        for stored in self.conversion.residents:
            item = stored.tensor
            if not wanted(item.name):
                continue
            if not item.sources:
                tensors[item.name] = torch.full(item.shape, item.fill)
                continue
            array = built(item, self.conversion.checkpoint, self.conversion.full_name)
            if item.name == canonical.EMBED and tokens is not None:
                array = array[tokens.numpy()]
            tensors[item.name] = _widened(array, stored.dtype)
        return tensors


@dataclass(frozen=True, slots=True)
class StoreWeights:
    """Tensors of a store."""

    store: Store

    @property
    def architecture(self) -> Architecture:
        return self.store.architecture

    @property
    def name(self) -> str:
        return self.store.manifest.name

    @property
    def synthetic(self) -> bool:
        return "synthetic" in self.store.manifest.name or "synthetic" in self.store.manifest.parameters

    def first(self, tokens: Tensor) -> dict[str, Tensor]:
        resident = Tensors(self.store.path / RESIDENT)
        found = {name: resident.read(name) for name in resident.names if name in FIRST}
        found[canonical.EMBED] = found[canonical.EMBED][tokens.numpy()]
        return {name: _widened(array, resident.dtype(name)) for name, array in found.items()}

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = canonical.layer(index, "")
        resident = Tensors(self.store.path / RESIDENT)
        tensors = {
            name.removeprefix(prefix): _widened(resident.read(name), resident.dtype(name))
            for name in resident.names
            if name.startswith(prefix)
        }
        roles = [row.role for row in self.store.layout.layers[index].unit.rows]
        for role, rows in zip(roles, self.store.ffn(index, *roles), strict=True):
            matrix = torch.from_numpy(rows.widened())
            tensors[f"{role}.weight"] = matrix.T if role == "down" else matrix
        return tensors
