"""A store on disk, opened: its manifest, its FFN matrices, its predictors' files. FORMAT.md has every byte.

`Store.open` validates everything that is cheap to validate; afterwards the store is trusted.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.architecture import Architecture
from storage.architecture import layer as layer_part
from storage.codecs import F32
from storage.errors import StoreError, StoreIncomplete, StoreMissing, UsageError, reason
from storage.layout import Layout, Role, Rows
from storage.manifest import BUNDLES, MANIFEST, ORDER, PREDICTORS, RESIDENT, Manifest
from storage.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Decider:
    """A projection of which `rows · x + bias` has a sign that counts; the bias holds the threshold."""

    rows: Rows  # [neurons, d_model]
    bias: F32  # [neurons]


@dataclass(frozen=True, slots=True)
class Store:
    """An opened store."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open and check sizes.

        Raises StoreIncomplete for an interrupted conversion, StoreMissing where there is no store,
        StoreError for a damaged one.
        """
        path = Path(os.path.abspath(path))  # so that `.` has a name and a parent, too
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            if os.path.isdir(unfinished(path)):
                raise StoreIncomplete(
                    f"the conversion to {path} was interrupted; run the same command again to resume it"
                )
            if not path.exists():
                raise StoreMissing(f"there is no store {path}")
            raise StoreMissing(f"{path} is not a store: it has no {MANIFEST}")
        try:
            data = json.loads(manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{manifest_path} cannot be read: {reason(error)}") from error
        manifest = Manifest.from_json(data, manifest_path)
        for name, entry in manifest.files.items():
            try:
                size = (path / name).stat().st_size
            except FileNotFoundError:
                raise StoreError(f"the store {path} lacks its file {name}") from None
            except OSError as error:
                raise StoreError(f"{path / name} cannot be read: {reason(error)}") from error
            if size != entry.bytes:
                raise StoreError(f"{path / name} has {size:,} bytes where its manifest says {entry.bytes:,}")
        if manifest.files[BUNDLES].bytes != manifest.layout.total_bytes:
            raise StoreError(f"{path / BUNDLES} does not have the size that its layout needs")
        return cls(path, manifest)

    @property
    def architecture(self) -> Architecture:
        return self.manifest.architecture

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def identity(self) -> str:
        """What predictors are bound to: the hash of the bundles."""
        return self.manifest.files[BUNDLES].xxh3_128

    def state(self) -> tuple[tuple[str, int, int, int], ...]:
        """Another value once a file of the manifest, or the manifest itself, has been written or replaced."""
        found = []
        for name in (MANIFEST, *self.manifest.files):
            try:
                status = (self.path / name).stat()
            except OSError:
                continue
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def predictors(self, name: str) -> Path:
        """The file of the predictors `name`, which need not be there. Raises UsageError for no file name."""
        if not name or "/" in name or "\0" in name or name.startswith("."):
            raise UsageError(f"{name!r} cannot name predictors: it must be a plain file name")
        return self.path / PREDICTORS / f"{name}.safetensors"

    def order(self) -> tuple[npt.NDArray[np.int32], ...] | None:
        """Of each layer the unit at each file position. None when that is its id."""
        if self.manifest.order == "id":
            return None
        return self.layout.split(np.fromfile(self.path / ORDER, np.int32))

    def positions(self) -> tuple[npt.NDArray[np.int32], ...] | None:
        """Its inverse: of each layer the file position of each unit id."""
        order = self.order()
        return None if order is None else tuple(np.argsort(one).astype(np.int32) for one in order)

    def read_layer(self, layer: int) -> npt.NDArray[np.uint8]:
        """All units of a layer by ascending id, `[units, stride]` bytes.

        For conversion checks, predictor training and evaluation; the ring never calls it.
        """
        part = self.layout.layers[layer]
        raw = np.fromfile(self.path / BUNDLES, np.uint8, count=part.bytes, offset=part.start)
        units = raw.reshape(part.units, part.unit.stride)
        order = self.order()
        return units if order is None else units[np.argsort(order[layer])]

    def ffn(self, layer: int, *roles: Role) -> tuple[Rows, ...]:
        """The rows of a layer's FFN, one role after the other, by ascending id; read now."""
        units, unit = self.read_layer(layer), self.layout.layers[layer].unit
        return tuple(unit.view(units, role) for role in roles)

    def deciding(self, layer: int, units: npt.NDArray[np.uint8] | None = None) -> tuple[Decider, ...]:
        """What decides which neurons of a sparse layer are active: those that exceed zero in each.

        `units` saves reading the layer again (`read_layer`).
        """
        ffn, unit = self.architecture.layers[layer].ffn, self.layout.layers[layer].unit
        memory = self.read_layer(layer) if units is None else units
        resident, found = Tensors(self.path / RESIDENT), []
        for role in ffn.deciding:
            name = layer_part(layer, f"{role}.bias")
            bias = np.zeros(ffn.neurons, np.float32)
            if name in resident:
                bias += resident.vector(name, bias.shape)
            if role == ffn.deciding[0]:  # what the activation function is applied to
                bias -= np.float32(ffn.threshold)
            found.append(Decider(unit.view(memory, role), bias))
        return tuple(found)


def unfinished(path: Path) -> Path:
    """Where a conversion into the absolute `path` is until it is done. Also of `/`, which has no name."""
    return path.parent / f"{path.name}.partial"
