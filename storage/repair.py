"""A damaged store made whole again from the checkpoint that it was converted from.

Only what differs from its checksum is written: a unit of `bundles.bin` in its place, any other file as a
whole under its name. A repair that is killed leaves what it has not reached as it was, and may be run again.
What does not match the checksum that the store has of it is not written: another checkpoint mends nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from storage import resident, tokenizer
from storage.bundles import BLOCK_BYTES, checksums, spans
from storage.codecs import FLOATS
from storage.convert import units
from storage.convert.conversion import Conversion, NeuronOrder, check, same_parameters
from storage.convert.opening import open_origin
from storage.convert.recipe import Recipe
from storage.convert.write import writing
from storage.errors import FlashringError, StoreError, StoreMissing, UsageError, reason
from storage.files import blocks, from_disk, replacing, write_whole
from storage.lock import locked
from storage.manifest import (
    BUNDLES,
    CHECKSUMS,
    MANIFEST,
    ORDER,
    RESIDENT,
    SEAL,
    FileEntry,
    Manifest,
    seal,
)

Progress = Callable[[str, int, int], None]  # (file, bytes done, bytes in all)
Sums = tuple[npt.NDArray[np.uint64], ...]  # of each layer


@dataclass(frozen=True, slots=True)
class Mended:
    """What a repair has written."""

    units: tuple[tuple[int, int], ...]  # layer and file position of each
    files: tuple[str, ...]  # written as a whole

    def __bool__(self) -> bool:
        return bool(self.units or self.files)


def repair(path: Path, checkpoint: Path, progress: Progress = lambda name, done, total: None) -> Mended:
    """Mend the store at `path` from a checkpoint's directory or a GGUF file.

    Raises UsageError for another checkpoint than it was converted from, StoreError for damage that no
    checkpoint mends, CheckpointError for a checkpoint that cannot be read, DiskFull.
    """
    path = Path(os.path.abspath(path))
    said = _read_manifest(path)
    conversion = _conversion(path, said, checkpoint)
    with writing(path), locked(path, "repair"):
        return _Repair(path, said, conversion, progress).run()


def _read_manifest(path: Path) -> dict[str, Any]:
    """As far as it can be read, damaged or not."""
    file = path / MANIFEST
    if not file.is_file():
        raise StoreMissing(f"{path} is not a store: it has no {MANIFEST}")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(said, dict) or not isinstance(said["parameters"], dict):
            raise TypeError("it has no parameters")
        if not isinstance(said["files"], dict):
            raise TypeError("it lists no files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{file} is damaged beyond repair, for it says what the store is made of ({reason_of(error)}): "
            f"remove {path} and convert the checkpoint again"
        ) from error
    return said


def reason_of(error: Exception) -> str:
    return reason(error) if not isinstance(error, KeyError) else f"it lacks {error}"


def _conversion(path: Path, said: dict[str, Any], checkpoint: Path) -> Conversion:
    """The conversion that made the store, or UsageError."""
    parameters = said["parameters"]
    alignment, bits = parameters.get("alignment"), parameters.get("bits")
    order, refusal = _order(path, parameters), None
    name = str(parameters.get("order"))
    for dtype, asked in [(None, bits), (None, 16), *((dtype, None) for dtype in FLOATS)]:
        recipes = (Recipe.of(bits), Recipe.small()) if bits == 4 else (Recipe.of(bits),)
        for recipe in recipes:
            try:
                origin = open_origin(checkpoint, dtype, asked)
                found = check(origin, alignment, None, recipe)
                if order is not None:
                    ids = order.reshape(len(found.layout.layers), -1)
                    found = check(origin, alignment, NeuronOrder(name, ids), recipe)
            except UsageError as error:  # a dtype for what is no GGUF file, or an alignment that is none
                refusal = error
                continue
            if same_parameters(found.parameters, parameters):
                return found
    raise UsageError(
        f"{path} was not converted from {checkpoint}, or one of them has changed since: "
        "a store is mended from the checkpoint that it was made from"
    ) from refusal


def _order(path: Path, parameters: dict[str, Any]) -> npt.NDArray[np.int32] | None:
    """The unit at each position, layer after layer, from the store itself: no checkpoint has it."""
    if parameters.get("order", "id") == "id":
        return None
    try:
        data = (path / ORDER).read_bytes()
    except OSError as error:
        raise StoreError(_lost_order(path)) from error
    if xxhash.xxh3_128_hexdigest(data) != parameters.get("order_xxh3_128"):
        raise StoreError(_lost_order(path))
    return np.frombuffer(data, np.int32)


def _lost_order(path: Path) -> str:
    return (
        f"{path / ORDER} is damaged, and no checkpoint has it: remove {path} and convert again with the "
        "--order that it had"
    )


class _Repair:
    """One repair, under the store's lock."""

    def __init__(self, path: Path, said: dict[str, Any], conversion: Conversion, progress: Progress) -> None:
        self._path, self._said, self._conversion = path, said, conversion
        self._progress = progress
        # Without a seal a manifest is what it says; with a broken one its hashes are worth nothing.
        self._trusted = said.get(SEAL, "") in ("", seal(said)) and self._describes()
        self._files: dict[str, Any] = dict(said["files"])
        self._units: list[tuple[int, int]] = []
        self._written: list[str] = []

    def _describes(self) -> bool:
        """Whether the manifest can be read as one."""
        try:
            Manifest.from_json(self._said, self._path / MANIFEST)
        except FlashringError:
            return False
        return True

    def run(self) -> Mended:
        sums, whole = self._sums()
        self._bundles(sums)
        if whole is not None:
            write_whole(self._path / CHECKSUMS, whole)
            self._written.append(CHECKSUMS)
        self._resident()
        self._texts()
        self._manifest()
        return Mended(tuple(self._units), tuple(self._written))

    # -- units ---------------------------------------------------------------------------------

    def _sums(self) -> tuple[Sums, bytes | None]:
        """The units' checksums; where those on disk are damaged, also the file's new bytes.

        They are then made from the whole checkpoint, and are not believed where the manifest says otherwise.
        """
        layout, path = self._conversion.layout, self._path / CHECKSUMS
        data = path.read_bytes() if path.is_file() else b""
        if self._trusted and self._is_listed(CHECKSUMS, data):
            return layout.split(np.frombuffer(data, "<u8")), None
        made = bytearray()
        for layer in range(len(layout.layers)):
            self._progress(CHECKSUMS, layout.offset(layer, 0), layout.total_bytes)
            for block in units.of_layer(self._conversion, layer):
                made += checksums(block).tobytes()
        self._believe(CHECKSUMS, bytes(made))
        return layout.split(np.frombuffer(bytes(made), "<u8")), None if data == made else bytes(made)

    def _bundles(self, sums: Sums) -> None:
        layout, path = self._conversion.layout, self._path / BUNDLES
        with path.open("r+b" if path.exists() else "w+b") as file:
            if os.fstat(file.fileno()).st_size != layout.total_bytes:
                file.truncate(layout.total_bytes)  # what is added is zeros, and mended like other damage
            for layer in range(len(layout.layers)):
                self._progress(BUNDLES, layout.offset(layer, 0), layout.total_bytes)
                wrong = self._wrong_units(file, layer, sums[layer])
                if wrong.size:
                    self._mend_units(file, layer, wrong, sums[layer])
            if self._units:
                file.flush()
                os.fsync(file.fileno())

    def _wrong_units(self, file: BinaryIO, layer: int, sums: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        part = self._conversion.layout.layers[layer]
        wrong = []
        for start, stop in spans(part):
            file.seek(part.offset(start))
            data = np.frombuffer(file.read((stop - start) * part.unit.stride), np.uint8)
            found = checksums(data.reshape(stop - start, part.unit.stride))
            wrong.append(np.flatnonzero(found != sums[start:stop]) + start)
        return np.concatenate(wrong) if wrong else np.zeros(0, np.int64)

    def _mend_units(
        self, file: BinaryIO, layer: int, wrong: npt.NDArray[np.int64], sums: npt.NDArray[np.uint64]
    ) -> None:
        part = self._conversion.layout.layers[layer]
        for start, block in units.chosen(self._conversion, layer, wrong):
            here = wrong[(wrong >= start) & (wrong < start + len(block))]
            rows = block[here - start]
            if not np.array_equal(checksums(rows), sums[here]):
                raise StoreError(self._other(f"units of layer {layer}"))
            for position, row in zip(here.tolist(), rows, strict=True):
                file.seek(part.offset(position))
                file.write(row.data)
                self._units.append((layer, position))

    # -- whole files ---------------------------------------------------------------------------

    def _resident(self) -> None:
        conversion, path = self._conversion, self._path / RESIDENT
        total = resident.size(conversion.residents)
        found = _entry(path)
        if self._trusted and found == self._listed(RESIDENT):
            return
        with replacing(path) as file:
            made = resident.write(
                file,
                conversion.residents,
                conversion.checkpoint,
                conversion.full_name,
                lambda done: self._progress(RESIDENT, done, total),
            )
            if self._trusted and made != self._listed(RESIDENT):
                raise StoreError(self._other(RESIDENT))
        self._files[RESIDENT] = _as_json(made)
        if found != made:
            self._written.append(RESIDENT)

    def _texts(self) -> None:
        """Tokenizer, templates and the like: where one is damaged, all as the checkpoint has them now."""
        listed = [name for name in self._files if tokenizer.is_text(name)]
        if self._trusted and all(_entry(self._path / name) == self._listed(name) for name in listed):
            return
        made = self._conversion.checkpoint.texts()
        for name in {*listed} - made.keys():
            del self._files[name]
        for name, data in made.items():
            entry = FileEntry(len(data), xxhash.xxh3_128_hexdigest(data))
            self._files[name] = _as_json(entry)
            if _entry(self._path / name) != entry:
                write_whole(self._path / name, data)
                self._written.append(name)

    def _manifest(self) -> None:
        """Renewed where it was damaged, or where what it lists has changed."""
        if self._trusted and self._files == self._said["files"]:
            return
        conversion = self._conversion
        files = dict(self._files)
        if not self._trusted:
            made = {BUNDLES, CHECKSUMS, *([ORDER] if conversion.order is not None else [])}
            files |= {name: _as_json(_entry(self._path / name)) for name in made}
        manifest = Manifest(
            architecture=conversion.architecture,
            layout=conversion.layout,
            order="id" if conversion.order is None else conversion.order.name,
            name=str(self._said.get("name", self._path.name)),
            files={name: FileEntry(**entry) for name, entry in files.items()},
            parameters=conversion.parameters,
        )
        write_whole(self._path / MANIFEST, json.dumps(manifest.to_json(), indent=2).encode())
        self._written.append(MANIFEST)

    # -- what the manifest says ----------------------------------------------------------------

    def _listed(self, name: str) -> FileEntry | None:
        entry = self._said["files"].get(name)
        return FileEntry(**entry) if isinstance(entry, dict) else None

    def _is_listed(self, name: str, data: bytes) -> bool:
        return self._listed(name) == FileEntry(len(data), xxhash.xxh3_128_hexdigest(data))

    def _believe(self, name: str, data: bytes) -> None:
        """Raises StoreError for bytes that a manifest in order has another hash of."""
        if self._trusted and not self._is_listed(name, data):
            raise StoreError(self._other(name))

    def _other(self, what: str) -> str:
        return (
            f"the checkpoint gives other {what} than {self._path} had, although it looks like the one that "
            "it was converted from; nothing of that was written: convert it again"
        )


def _entry(path: Path) -> FileEntry:
    """Size and hash of a file; of one that is missing, those of an empty one."""
    if not path.is_file():
        return FileEntry(0, "")
    digest, size = xxhash.xxh3_128(), 0
    with from_disk(path) as file:
        for block in blocks(file, BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def _as_json(entry: FileEntry) -> dict[str, Any]:
    return {"bytes": entry.bytes, "xxh3_128": entry.xxh3_128}
