"""A synthetic mixture as something that is converted: its tensors are drawn when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage import tokenizer
from storage.checkpoint import HEAD_SOURCE
from storage.codecs import Carrier
from storage.errors import CheckpointError
from storage.families.family import Family, Source
from storage.layout import Role
from storage.origin import Entry
from workers.lab.synthesis.mixture.tensors import Tensors


@dataclass(frozen=True, slots=True)
class _Resident:
    """A source of a resident tensor: lines [start, start + those of the source) of `name`."""

    name: str
    start: int


@dataclass(frozen=True, slots=True)
class _Expert:
    layer: int
    expert: int
    role: Role


@dataclass(frozen=True, slots=True)
class SyntheticMixture:
    """An `Origin`."""

    config: dict[str, Any]
    tensors: Tensors
    tokenizer: Path | None
    entries: dict[str, Entry]
    _what: Mapping[str, _Resident | _Expert]

    @classmethod
    def of(
        cls, config: dict[str, Any], family: Family, tensors: Tensors, tokenizer: Path | None
    ) -> SyntheticMixture:
        """Under the names that the family's checkpoints have; experts one by one. Raises UnsupportedModel."""
        model, where = tensors.model, Path(str(config["_name_or_path"]))
        entries: dict[str, Entry] = {}
        what: dict[str, _Resident | _Expert] = {}

        def add(source: Source, codec: str, is_: _Resident | _Expert) -> None:
            head = source.name == HEAD_SOURCE
            name = source.name if head else family.prefixes[0] + source.name
            entries[name], what[name] = Entry(where, source.whole, codec, 0), is_

        for resident in family.resident(config, model):
            start = 0
            for source in resident.sources:
                add(source, tensors.codec(resident.name), _Resident(resident.name, start))
                start += source.shape[0]
        assert family.experts is not None
        for layer, one in enumerate(model.layers):
            for expert in range(one.ffn.units):
                for role, source in family.experts(model, layer, expert)[0].items():
                    add(source, tensors.experts, _Expert(layer, expert, role))
        return cls(config, tensors, tokenizer, entries, what)

    @property
    def path(self) -> Path:
        return Path(str(self.config["_name_or_path"]))

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        entry = self.entries.get(name)
        if entry is None or (shape is not None and entry.shape != shape):
            raise CheckpointError(f"{self.path} has no tensor {name} of the shape {shape}")
        return entry

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        what, lines = self._what[name], self.entries[name].shape[0]
        stop = lines if stop is None else stop
        if isinstance(what, _Expert):
            return self.tensors.expert(what.layer, what.expert, what.role)[start:stop]
        whole = list(self.tensors.blocks(what.name))
        return np.concatenate(whole)[what.start + start : what.start + stop]

    def chunks(self, name: str, size: int = 64 << 20) -> Iterator[Carrier]:
        what = self._what[name]
        assert isinstance(what, _Resident)
        assert what.start == 0
        for block in self.tensors.blocks(what.name):
            flat = block.reshape(-1)
            step = max(1, size // flat.itemsize)
            yield from (flat[start : start + step] for start in range(0, flat.size, step))

    def release(self) -> None:
        """Nothing is kept."""

    def generation(self) -> dict[str, Any]:
        return {}

    def texts(self) -> dict[str, bytes]:
        return {} if self.tokenizer is None else tokenizer.texts(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        return {"synthetic": self.config["synthetic"], "layers": len(self.tensors.model.layers)}
