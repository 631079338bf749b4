"""`manifest.json`: what a store is, and of which files it consists. FORMAT.md, "manifest.json"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from storage import version1
from storage.architecture import Architecture, Ffn, LongropeScaling, Rope
from storage.codecs import CODECS
from storage.errors import StoreCorrupt, StoreError
from storage.layout import ROLES, LayerLayout, Layout, Row, Unit, check_alignment
from storage.records import of_type, read_record

FORMAT_NAME = "flashring-store"
FORMAT_VERSION = 2  # what is written; version 1 is read as well

MANIFEST = "manifest.json"
RESIDENT = "resident.safetensors"
BUNDLES = "bundles.bin"
CHECKSUMS = "checksums.bin"
ORDER = "order.bin"
PREDICTORS = "predictors"

_BEYOND = 1 << 31  # that many heads, tokens or values no model has
_LONGEST_NAME = 200  # characters of a file's name
SEAL = "xxh3_128"  # the manifest's own hash, in it
CHECKSUM_BYTES = 8  # of one unit in checksums.bin
ORDER_BYTES = 4  # of one unit in order.bin


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
        """With its seal."""
        data: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "architecture": self.architecture.to_json(),
            "layout": [_layer_to_json(layer) for layer in self.layout.layers],
            "order": self.order,
            "name": self.name,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "parameters": self.parameters,
        }
        return {**data, SEAL: seal(data)}

    @classmethod
    def from_json(cls, data: Any, where: Path) -> Manifest:
        """Raises StoreError naming `where` for anything that its version does not allow."""
        if not isinstance(data, dict) or data.get("format") != FORMAT_NAME:
            raise StoreError(f"{where} is not a flashring store manifest")
        version = data.get("version")
        if type(version) is not int or version not in {1, FORMAT_VERSION}:
            raise StoreError(
                f"{where} has format version {version!r:.20}; this flashring reads versions 1 and "
                f"{FORMAT_VERSION}: convert the checkpoint again"
            )
        try:
            if version == 1:
                architecture = version1.architecture(data["architecture"])
                layout = version1.layout(data, architecture)
            else:
                architecture = Architecture.from_json(data["architecture"])
                layout = _layout_from_json(data["layout"])
            manifest = cls(
                architecture=architecture,
                layout=layout,
                order=of_type(str, data["order"]),
                name=of_type(str, data["name"]),
                files={_file_name(name): read_record(FileEntry, one) for name, one in data["files"].items()},
                parameters=of_type(dict, data["parameters"]),
            )
        except KeyError as error:
            raise StoreError(f"{where} is damaged: it lacks {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{where} is damaged: {error}") from error
        needed = {BUNDLES, RESIDENT} if manifest.order == "id" else {BUNDLES, RESIDENT, ORDER}
        if lacking := needed - manifest.files.keys():
            raise StoreError(f"{where} is damaged: it does not list {min(lacking)}")
        if flaw := _flaw(manifest):
            raise StoreError(f"{where} {flaw}")
        if data.get(SEAL, "") not in ("", seal(data)):
            raise StoreCorrupt(f"{where} is damaged: it does not match its own hash")
        return manifest


def seal(data: Mapping[str, Any]) -> str:
    """The hash of a manifest's other fields, whatever their order. FORMAT.md, "manifest.json"."""
    rest = {name: value for name, value in data.items() if name != SEAL}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _file_name(name: str) -> str:
    """Of a file in the store itself. Raises ValueError for anything else."""
    if not name or "/" in name or "\0" in name or len(name) > _LONGEST_NAME:
        raise ValueError(f"a file named {name!r:.40}")
    return name


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
        check_alignment(unit.alignment)
        numbers = (layer["units"], unit.width, unit.d_model)
        if not all(type(number) is int for number in numbers) or layer["units"] < 0 or min(numbers[1:]) < 1:
            raise ValueError(f"a layer of {numbers} units, neurons and values")
        for row in rows:
            if row.codec not in CODECS or not CODECS[row.codec].fits(unit.shape(row.role)[1]):
                raise ValueError(f"rows of {row.codec!s:.40}")
        if unit.stride != layer["stride"]:
            raise ValueError(f"units of {layer['stride']} bytes where their rows take {unit.stride}")
        placed.append((layer["units"], unit))
    return Layout.of(placed)


def _flaw(manifest: Manifest) -> str:
    """Why the layout does not fit the architecture, to stand behind the file's name; empty where it does."""
    architecture, layout = manifest.architecture, manifest.layout
    if len(layout.layers) != len(architecture.layers) or not layout.total_units:
        return "is damaged: architecture and layout have different numbers of layers, or no units at all"
    for part, layer in zip(layout.layers, architecture.layers, strict=True):
        roles = tuple(row.role for row in part.unit.rows)
        if roles != ROLES[layer.ffn.kind] or (part.unit.width > 1 and layer.ffn.sparse):
            return "describes units that this flashring does not read"
        if (part.units, part.unit.width, part.unit.d_model) != (
            layer.ffn.units,
            layer.ffn.width,
            architecture.d_model,
        ):
            return "is damaged: its layout is not its architecture's"
        if not _whole_elements(part.unit, layout.stride):
            return "describes units whose rows do not begin where their numbers can be read"
    if manifest.order != "id" and manifest.files[ORDER].bytes != ORDER_BYTES * layout.total_units:
        return f"is damaged: {ORDER} does not have the size that its layout needs"
    return _senseless(architecture)


def _whole_elements(unit: Unit, slot: int) -> bool:
    """Whether all rows, in the store and in slots of so many bytes, begin at multiples of their elements."""
    for row in unit.rows:
        size = np.dtype(unit.codec(row.role).carrier).itemsize
        if unit.span(row.role)[0] % size or unit.stride % size or slot % size:
            return False
    return True


def _rotates(rope: Rope | None, head_dim: int) -> bool:
    """Whether heads of this width can be rotated so."""
    if rope is None:
        return True
    dims = head_dim if rope.dims is None else rope.dims
    if isinstance(rope.scaling, LongropeScaling):
        factors = {2 * len(rope.scaling.short), 2 * len(rope.scaling.long)}
        return factors == {dims} and dims <= head_dim
    return dims % 2 == 0 and 0 < dims <= head_dim


def _routes(ffn: Ffn) -> bool:
    """Whether there are as many experts as a token has, and something of every shared part."""
    if ffn.shared is not None and not 0 < ffn.shared.width < _BEYOND:
        return False
    router = ffn.router
    if router is None:
        return ffn.units > 0 or ffn.shared is not None
    return ffn.kind == "gated" and 0 < router.top_k <= ffn.units


def _senseless(model: Architecture) -> str:
    """What is wrong with an architecture's numbers, as `_flaw` says it."""
    sizes = [model.vocabulary, model.max_positions, model.embed_dim]
    for one in model.layers:
        sizes += [one.attention.heads, one.attention.kv_heads, one.attention.head_dim]
        sizes += [] if one.attention.window is None else [one.attention.window]
    if min(sizes) < 1 or max(sizes) >= _BEYOND:
        return "is damaged: its architecture has sizes that cannot be"
    if not all(_routes(one.ffn) for one in model.layers):
        return "is damaged: its experts cannot be what they are said to be"
    if any(one.attention.heads % one.attention.kv_heads for one in model.layers):
        return "is damaged: its heads do not share keys and values evenly"
    if not all(_rotates(one.attention.rope, one.attention.head_dim) for one in model.layers):
        return "is damaged: its rotary positions do not fit its heads"
    return ""
