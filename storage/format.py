"""The store on disk: manifest, layout arithmetic and opening. FORMAT.md describes every byte.

`Store.open` validates everything that is cheap to validate; afterwards the store is trusted.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import StoreError, StoreIncomplete, StoreMissing, UsageError, reason
from storage.families.architecture import Architecture

FORMAT_NAME = "flashring-store"
FORMAT_VERSION = 1
ROWS = 2
DEFAULT_ALIGNMENT = 512

MANIFEST = "manifest.json"
RESIDENT = "resident.safetensors"
BUNDLES = "bundles.bin"
CHECKSUMS = "checksums.bin"
ORDER = "order.bin"
TOKENIZER = "tokenizer.json"
PREDICTORS = "predictors"

# bfloat16 and float16 are held as uint16 by everything that is not torch: numpy has no bfloat16,
# numba has neither.
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
CARRIER: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.uint16,
    "bfloat16": np.uint16,
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and XXH3-128 (hex) of one file of the store."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a bundle lies in `bundles.bin`. Sizes in bytes."""

    layers: int
    d_ff: int
    d_model: int
    dtype: str
    alignment: int = DEFAULT_ALIGNMENT
    rows: int = ROWS

    @property
    def row_bytes(self) -> int:
        return self.d_model * ITEMSIZE[self.dtype]

    @property
    def stride(self) -> int:
        return -(-self.rows * self.row_bytes // self.alignment) * self.alignment

    @property
    def layer_bytes(self) -> int:
        return self.d_ff * self.stride

    @property
    def total_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def offset(self, layer: int, position: int) -> int:
        return layer * self.layer_bytes + position * self.stride


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json`, field by field."""

    architecture: Architecture
    layout: Layout
    order: str  # "id", or the name of the method that wrote order.bin
    name: str
    files: dict[str, FileEntry]
    parameters: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "architecture": self.architecture.to_json(),
            "dtype": self.layout.dtype,
            "rows": self.layout.rows,
            "row_bytes": self.layout.row_bytes,
            "stride": self.layout.stride,
            "alignment": self.layout.alignment,
            "order": self.order,
            "name": self.name,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "parameters": self.parameters,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: Path) -> Manifest:
        """Raises StoreError naming `where` for anything that version 1 does not allow."""
        if not isinstance(data, dict) or data.get("format") != FORMAT_NAME:
            raise StoreError(f"{where} is not a flashring store manifest")
        if data.get("version") != FORMAT_VERSION:
            raise StoreError(
                f"{where} has format version {data.get('version')}; this flashring reads version "
                f"{FORMAT_VERSION}: convert the checkpoint again"
            )
        try:
            architecture = Architecture.from_json(data["architecture"])
            layout = Layout(
                layers=architecture.layers,
                d_ff=architecture.d_ff,
                d_model=architecture.d_model,
                dtype=data["dtype"],
                alignment=data["alignment"],
                rows=data["rows"],
            )
            stride = data["stride"]
            manifest = cls(
                architecture=architecture,
                layout=layout,
                order=data["order"],
                name=data["name"],
                files={name: FileEntry(**entry) for name, entry in data["files"].items()},
                parameters=data["parameters"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{where} is damaged: {error}") from error
        if lacking := {BUNDLES, RESIDENT} - manifest.files.keys():
            raise StoreError(f"{where} is damaged: it does not list {min(lacking)}")
        if not isinstance(layout.alignment, int) or layout.alignment < 1:
            raise StoreError(f"{where} is damaged: an alignment of {layout.alignment!r} bytes")
        if layout.dtype not in ITEMSIZE or layout.rows != ROWS or layout.stride != stride:
            raise StoreError(f"{where} describes a layout that this flashring does not read")
        return manifest


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
            if unfinished(path).is_dir():
                raise StoreIncomplete(
                    f"the conversion to {path} was interrupted; run the same command again to resume it"
                )
            if not path.exists():
                raise StoreMissing(f"there is no store {path}")
            raise StoreMissing(f"{path} is not a store: it has no {MANIFEST}")
        try:
            data = json.loads(manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{manifest_path} cannot be read: {reason(error)}") from error
        manifest = Manifest.from_json(data, manifest_path)
        for name, entry in manifest.files.items():
            try:
                size = (path / name).stat().st_size
            except FileNotFoundError:
                raise StoreError(f"the store {path} lacks its file {name}") from None
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

    def predictors(self, name: str) -> Path:
        """The file of the predictors `name`, which need not be there. Raises UsageError for no file name."""
        if not name or "/" in name or "\0" in name or name.startswith("."):
            raise UsageError(f"{name!r} cannot name predictors: it must be a plain file name")
        return self.path / PREDICTORS / f"{name}.safetensors"

    def order(self) -> npt.NDArray[np.int32] | None:
        """The neuron order, `[layers, d_ff]`: the neuron at each file position. None when that is its id."""
        if self.manifest.order == "id":
            return None
        return np.fromfile(self.path / ORDER, np.int32).reshape(self.layout.layers, self.layout.d_ff)

    def positions(self) -> npt.NDArray[np.int32] | None:
        """Its inverse, `[layers, d_ff]`: the file position of each neuron id."""
        order = self.order()
        return None if order is None else np.argsort(order, axis=1).astype(np.int32)

    def read_layer(self, layer: int) -> npt.NDArray[np.generic]:
        """All bundles of a layer in neuron-id order, `[d_ff, rows, d_model]` of the carrier type.

        For conversion checks, predictor training and evaluation; the ring never calls it.
        """
        raw = np.fromfile(
            self.path / BUNDLES,
            np.uint8,
            count=self.layout.layer_bytes,
            offset=self.layout.offset(layer, 0),
        ).reshape(self.layout.d_ff, self.layout.stride)
        used = raw[:, : self.layout.rows * self.layout.row_bytes]
        bundles = np.ascontiguousarray(used).view(CARRIER[self.layout.dtype])
        bundles = bundles.reshape(self.layout.d_ff, self.layout.rows, self.layout.d_model)
        positions = self.positions()
        return bundles if positions is None else bundles[positions[layer]]


def unfinished(path: Path) -> Path:
    """Where a conversion into the absolute `path` is until it is done. Also of `/`, which has no name."""
    return path.parent / f"{path.name}.partial"


def fsync_directory(path: Path) -> None:
    """Make a rename or a new name in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
