"""`manifest.json`: what a store is, and of which files it consists. FORMAT.md, "manifest.json"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage import version1
from storage.architecture import Architecture
from storage.codecs import CODECS
from storage.errors import StoreError
from storage.layout import ROLES, LayerLayout, Layout, Row, Unit

FORMAT_NAME = "flashring-store"
FORMAT_VERSION = 2  # what is written; version 1 is read as well

MANIFEST = "manifest.json"
RESIDENT = "resident.safetensors"
BUNDLES = "bundles.bin"
CHECKSUMS = "checksums.bin"
ORDER = "order.bin"
PREDICTORS = "predictors"

CHECKSUM_BYTES = 8  # of one unit in checksums.bin


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and XXH3-128 (hex) of one file of the store."""

    bytes: int
    xxh3_128: str


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
            "layout": [_layer_to_json(layer) for layer in self.layout.layers],
            "order": self.order,
            "name": self.name,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "parameters": self.parameters,
        }

    @classmethod
    def from_json(cls, data: Any, where: Path) -> Manifest:
        """Raises StoreError naming `where` for anything that its version does not allow."""
        if not isinstance(data, dict) or data.get("format") != FORMAT_NAME:
            raise StoreError(f"{where} is not a flashring store manifest")
        if data.get("version") not in {1, FORMAT_VERSION}:
            raise StoreError(
                f"{where} has format version {data.get('version')}; this flashring reads versions 1 and "
                f"{FORMAT_VERSION}: convert the checkpoint again"
            )
        try:
            if data["version"] == 1:
                architecture = version1.architecture(data["architecture"])
                layout = version1.layout(data, architecture)
            else:
                architecture = Architecture.from_json(data["architecture"])
                layout = _layout_from_json(data["layout"])
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
        if flaw := _flaw(manifest):
            raise StoreError(f"{where} {flaw}")
        return manifest


def _layer_to_json(layer: LayerLayout) -> dict[str, Any]:
    unit = layer.unit
    return {
        "units": layer.units,
        "width": unit.width,
        "d_model": unit.d_model,
        "rows": {row.role: row.codec for row in unit.rows},
        "alignment": unit.alignment,
        "stride": unit.stride,
    }


def _layout_from_json(layers: list[Mapping[str, Any]]) -> Layout:
    """Raises KeyError, TypeError, ValueError or AttributeError for what makes no layout."""
    placed = []
    for layer in layers:
        rows = tuple(Row(role, codec) for role, codec in layer["rows"].items())
        unit = Unit(rows, layer["width"], layer["d_model"], layer["alignment"])
        if type(unit.alignment) is not int or unit.alignment < 1:
            raise ValueError(f"an alignment of {unit.alignment!r} bytes")
        numbers = (layer["units"], unit.width, unit.d_model)
        if not all(type(number) is int for number in numbers) or layer["units"] < 0 or min(numbers[1:]) < 1:
            raise ValueError(f"a layer of {numbers} units, neurons and values")
        if not all(row.codec in CODECS for row in rows):
            raise ValueError(f"rows of {', '.join(row.codec for row in rows)}")
        if unit.stride != layer["stride"]:
            raise ValueError(f"units of {layer['stride']} bytes where their rows take {unit.stride}")
        placed.append((layer["units"], unit))
    return Layout.of(placed)


def _flaw(manifest: Manifest) -> str:
    """Why the layout does not fit the architecture, to stand behind the file's name; empty where it does."""
    architecture, layout = manifest.architecture, manifest.layout
    if len(layout.layers) != len(architecture.layers) or not layout.layers:
        return "is damaged: architecture and layout have different numbers of layers"
    for part, layer in zip(layout.layers, architecture.layers, strict=True):
        if tuple(row.role for row in part.unit.rows) != ROLES[layer.ffn.kind]:
            return "describes units that this flashring does not read"
        if (part.units, part.unit.width, part.unit.d_model) != (
            layer.ffn.units,
            layer.ffn.width,
            architecture.d_model,
        ):
            return "is damaged: its layout is not its architecture's"
    return ""
