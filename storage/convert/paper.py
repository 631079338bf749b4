"""A store that nobody has made yet: what a conversion would write, from a `config.json` alone.

The checks of a real conversion run on a checkpoint of which every tensor is there in the shape that is asked
for. So layout and sizes are those of the store that `convert --bits` makes of the published weights, byte for
byte. Only its architecture, layout and sizes can be asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage import resident
from storage.checkpoint import HEAD_SOURCE
from storage.codecs import CODECS, Carrier
from storage.convert.conversion import check
from storage.convert.recipe import Recipe
from storage.families.registry import family_of
from storage.layout import DEFAULT_ALIGNMENT
from storage.manifest import BUNDLES, RESIDENT, FileEntry, Manifest
from storage.origin import Entry, Origin
from storage.store import Store

NOWHERE = Path("/nonexistent")  # a store's directory that is none


@dataclass(frozen=True, slots=True)
class Paper:
    """A store that is not there, and its resident tensors."""

    store: Store
    tensors: dict[str, tuple[str, int]]  # codec and bytes of each


def on_paper(name: str, config: Mapping[str, Any], dtype: str, bits: int | None = None) -> Paper:
    """The store of a published checkpoint with this `config.json`, its weights in `dtype`.

    Raises UnsupportedModel, and UsageError for bits that are not offered.
    """
    return of_origin(PaperCheckpoint(name, dict(config), dtype), name, bits)


def of_origin(origin: Origin, name: str, bits: int | None = None) -> Paper:
    """The store of a checkpoint that is there, and was not converted yet. Raises as a conversion does."""
    conversion = check(origin, DEFAULT_ALIGNMENT, None, Recipe.of(bits))
    files = {
        BUNDLES: FileEntry(conversion.layout.total_bytes, ""),
        RESIDENT: FileEntry(resident.size(conversion.residents), ""),
    }
    manifest = Manifest(conversion.architecture, conversion.layout, "id", name, files, conversion.parameters)
    tensors = {
        one.tensor.name: (one.dtype, CODECS[one.dtype].size(one.tensor.elements))
        for one in conversion.residents
    }
    return Paper(Store(NOWHERE / name, manifest), tensors)


class _Everything(Mapping[str, Entry]):
    """Every name but a head's, where the model has none of its own."""

    def __init__(self, entry: Entry, head: bool) -> None:
        self._entry, self._head = entry, head

    def __contains__(self, name: object) -> bool:
        return self._head or name != HEAD_SOURCE

    def __getitem__(self, name: str) -> Entry:
        if name not in self:
            raise KeyError(name)
        return self._entry

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class PaperCheckpoint:
    """An `Origin` without tensors."""

    name: str
    config: dict[str, Any]
    dtype: str

    @property
    def path(self) -> Path:
        return NOWHERE / self.name

    @property
    def entries(self) -> Mapping[str, Entry]:
        head = not family_of(self.config).architecture(self.config).tied_head
        return _Everything(Entry(self.path, (), self.dtype, 0), head)

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        return Entry(self.path, shape or (), self.dtype, 0)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        raise AssertionError(f"{name} is on paper only")

    def chunks(self, name: str, size: int = 0) -> Iterator[Carrier]:
        """A head of its own differs from the embedding; more than that nobody asks."""
        yield np.array([name == HEAD_SOURCE])

    def release(self) -> None:
        """There is nothing to drop."""

    def generation(self) -> dict[str, Any]:
        return {}

    def texts(self) -> dict[str, bytes]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {"paper": self.name}
