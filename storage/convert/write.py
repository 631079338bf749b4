"""Writing a store: every file synced, then the manifest, then one rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from storage import resident
from storage.bundles import checksums, spans
from storage.convert import units
from storage.convert.conversion import Conversion, NeuronOrder, check, same_parameters
from storage.convert.journal import PROGRESS, Journal
from storage.convert.opening import open_origin
from storage.convert.recipe import AS_IT_IS, Recipe
from storage.errors import CheckpointError, DiskFull, StoreError, UsageError
from storage.files import fsync_directory, write_whole
from storage.layout import DEFAULT_ALIGNMENT, Layout
from storage.lock import locked
from storage.manifest import (
    BUNDLES,
    CHECKSUM_BYTES,
    CHECKSUMS,
    MANIFEST,
    ORDER,
    RESIDENT,
    FileEntry,
    Manifest,
)
from storage.origin import Origin
from storage.store import Store

SLACK_BYTES = 64 << 20  # free space asked for beyond the store's own: tokenizer, file system

Progress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)


def convert(
    checkpoint: Path,
    out: Path,
    *,
    name: str,
    alignment: int = DEFAULT_ALIGNMENT,
    order: NeuronOrder | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    small: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Convert a checkpoint's directory, or a GGUF file, into the store `out`, or resume doing so.

    An `out` that already is a store of the same source and parameters is returned as it is.
    `bits` is 16, 8 or 4 (`recipe.py`), None the checkpoint's own, with 4 also `small`; `dtype` is what a GGUF
    file's matrices are widened to.
    `progress` hears the stages "resume", "bundles" and "resident" in bytes.

    Raises CheckpointError or UnsupportedModel for the checkpoint, UsageError for an `out` or a
    parameter that cannot be, StoreIncomplete for an interrupted conversion with other parameters,
    DiskFull when the disk is or will be full; what is written then resumes.
    """
    recipe = Recipe.of(bits, small)
    origin = open_origin(checkpoint, dtype, bits)
    return convert_origin(
        origin,
        out,
        name=name,
        alignment=alignment,
        order=order,
        recipe=recipe,
        progress=progress,
    )


def convert_origin(
    origin: Origin,
    out: Path,
    *,
    name: str,
    alignment: int = DEFAULT_ALIGNMENT,
    order: NeuronOrder | None = None,
    recipe: Recipe = AS_IT_IS,
    progress: Progress | None = None,
) -> Store:
    """The same of what is open already."""
    out = Path(os.path.abspath(out))  # so that it has a name and a parent
    conversion = check(origin, alignment, order, recipe)
    existing = _existing(out, conversion)
    if existing is not None:
        return existing
    texts = origin.texts()  # before the weights, which take long: a tokenizer may be refused
    partial = out.with_name(out.name + ".partial")
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial, "conversion"):
            _write(conversion, texts, partial, name, progress or (lambda stage, done, total: None))
            os.rename(partial, out)
            fsync_directory(out.parent)
    (out / PROGRESS).unlink(missing_ok=True)
    return Store.open(out)


def _existing(out: Path, conversion: Conversion) -> Store | None:
    """The store at `out` if it is this conversion's result. Raises UsageError if it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is not a store: choose another directory")
    try:
        store = Store.open(out)
    except StoreError as error:
        raise UsageError(f"{out} exists and is damaged ({error}): remove it to convert again") from error
    if not same_parameters(store.manifest.parameters, conversion.parameters):
        raise UsageError(
            f"{out} is a store of another checkpoint or of other conversion parameters: "
            "choose another directory"
        )
    return store


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Turn the system's refusals into DiskFull or StoreError; what is written stays, and resumes."""
    try:
        yield
    except ValueError as error:  # of `Codec.narrow`
        raise CheckpointError(f"the checkpoint cannot be rounded: {error}") from error
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreError(f"{partial} cannot be written: {error.strerror}") from error
        raise DiskFull(
            f"no space left for {partial} ({error.strerror}); make room and run the same command again "
            "to resume"
        ) from error


def _write(
    conversion: Conversion, texts: Mapping[str, bytes], partial: Path, name: str, progress: Progress
) -> None:
    """Fill `partial` up to and including the manifest."""
    journal = Journal.open(partial, conversion)
    _check_space(conversion, partial)
    journal.record()
    files = _bundles(conversion, partial, journal, progress)
    if conversion.order is not None:
        files[ORDER] = _whole(partial, ORDER, conversion.order.neurons.tobytes())
    files[RESIDENT] = _resident(conversion, partial, journal, progress)
    for text, data in texts.items():
        files[text] = _whole(partial, text, data)
    manifest = Manifest(
        architecture=conversion.architecture,
        layout=conversion.layout,
        order="id" if conversion.order is None else conversion.order.name,
        name=name,
        files=files,
        parameters=conversion.parameters,
    )
    write_whole(partial / MANIFEST, json.dumps(manifest.to_json(), indent=2).encode())


def _check_space(conversion: Conversion, partial: Path) -> None:
    written = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
    needed = conversion.total_bytes + SLACK_BYTES - written
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise DiskFull(
            f"converting to {partial.parent} needs {needed / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB free; make room and run the same command again"
        )


def _bundles(
    conversion: Conversion, partial: Path, journal: Journal, progress: Progress
) -> dict[str, FileEntry]:
    """Write `bundles.bin` and `checksums.bin`, from the first layer that is not yet whole."""
    layout = conversion.layout
    path, sums_path = partial / BUNDLES, partial / CHECKSUMS
    path.touch()
    sums_path.touch()
    with path.open("r+b") as file, sums_path.open("r+b") as sums:
        done, digest = _rehash(layout, journal.layers, file, sums, progress)
        file.truncate(sum(part.bytes for part in layout.layers[:done]))
        sums.truncate(sum(layout.units[:done]) * CHECKSUM_BYTES)
        file.seek(0, os.SEEK_END)
        sums.seek(0, os.SEEK_END)
        for layer in range(done, len(layout.layers)):
            progress("bundles", layout.offset(layer, 0), layout.total_bytes)
            for block in units.of_layer(conversion, layer):
                file.write(block.data)
                digest.update(block.data)
                sums.write(checksums(block).data)
            for written in (file, sums):
                written.flush()
                os.fsync(written.fileno())
            journal.layers = layer + 1
            journal.record()
        progress("bundles", layout.total_bytes, layout.total_bytes)
        sums.seek(0)
        entry = FileEntry(layout.total_bytes, digest.hexdigest())
        return {BUNDLES: entry, CHECKSUMS: _entry(sums.read())}


def _rehash(
    layout: Layout, layers: int, file: BinaryIO, sums: BinaryIO, progress: Progress
) -> tuple[int, xxhash.xxh3_128]:
    """The leading layers of `layers` whose bundles match their checksums, and the hash of their bytes."""
    digest = xxhash.xxh3_128()
    complete = layout.layers[:layers]
    total = sum(part.bytes for part in complete)
    for layer, part in enumerate(complete):
        progress("resume", part.start, total)
        whole = digest.copy()
        for start, stop in spans(part):
            block = np.frombuffer(file.read((stop - start) * part.unit.stride), np.uint8)
            expected = np.frombuffer(sums.read((stop - start) * CHECKSUM_BYTES), "<u8")
            if block.size != (stop - start) * part.unit.stride:
                return layer, whole
            if not np.array_equal(checksums(block.reshape(stop - start, -1)), expected):
                return layer, whole
            digest.update(block.data)
    return layers, digest


def _resident(conversion: Conversion, partial: Path, journal: Journal, progress: Progress) -> FileEntry:
    path, total = partial / RESIDENT, resident.size(conversion.residents)
    if journal.resident is not None and path.is_file() and path.stat().st_size == total:
        return FileEntry(**journal.resident)
    with path.open("wb") as file:
        entry = resident.write(
            file,
            conversion.residents,
            conversion.checkpoint,
            conversion.full_name,
            lambda done: progress("resident", done, total),
        )
        file.flush()
        os.fsync(file.fileno())
    journal.resident = asdict(entry)
    journal.record()
    return entry


def _whole(partial: Path, name: str, data: bytes) -> FileEntry:
    (partial / name).write_bytes(data)
    return _synced(partial / name)


def _synced(path: Path) -> FileEntry:
    """Sync a small file and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return _entry(file.read())


def _entry(data: bytes) -> FileEntry:
    return FileEntry(len(data), xxhash.xxh3_128_hexdigest(data))
