"""Checkpoint in, store out: bounded memory, resumable, atomic. FORMAT.md, "Writing".

Order of work: check everything that can be checked without reading weights; write the bundles
layer by layer, recording each synced layer in `progress.json`; stream the resident tensors; copy
the tokenizer; write the manifest; rename. Memory is bounded by one layer's two FFN matrices.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from storage import resident, tokenizer
from storage.bundles import assemble, checksums, spans
from storage.checkpoint import GENERATION_CONFIG, Checkpoint, read_json
from storage.errors import (
    CheckpointError,
    DiskFull,
    StoreError,
    StoreIncomplete,
    UnsupportedModel,
    UsageError,
    reason,
)
from storage.families.architecture import Architecture
from storage.families.family import HEAD_SOURCE, Family, Resident, Source
from storage.families.registry import family_of
from storage.format import (
    BUNDLES,
    CHECKSUMS,
    DEFAULT_ALIGNMENT,
    FORMAT_VERSION,
    MANIFEST,
    ORDER,
    RESIDENT,
    FileEntry,
    Layout,
    Manifest,
    Store,
    fsync_directory,
)
from storage.lock import locked

PROGRESS = "progress.json"
TEMPORARY = ".tmp"
SLACK_BYTES = 64 << 20  # free space asked for beyond the store's own: tokenizer, file system

Progress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class NeuronOrder:
    """Which neuron lies at each position of `bundles.bin`: int32 `[layers, d_ff]`, and its method."""

    name: str
    neurons: npt.NDArray[np.int32]


def read_order(path: Path) -> NeuronOrder:
    """The order of a `.npy` file, named after it. Raises UsageError."""
    try:
        with path.open("rb") as file:
            neurons = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} is no neuron order: {reason(error)}") from error
    return NeuronOrder(path.stem, np.ascontiguousarray(neurons))


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked conversion: everything is present in the right shape and dtype."""

    checkpoint: Checkpoint
    family: Family
    prefix: str
    architecture: Architecture
    layout: Layout
    residents: tuple[Resident, ...]
    order: NeuronOrder | None
    parameters: dict[str, Any]

    def full_name(self, source: str) -> str:
        return source if source == HEAD_SOURCE else self.prefix + source

    @property
    def total_bytes(self) -> int:
        checksums = self.layout.layers * self.layout.d_ff * 8
        return self.layout.total_bytes + checksums + resident.size(self.residents, self.layout.dtype)


def convert(
    checkpoint: Path,
    out: Path,
    *,
    name: str,
    alignment: int = DEFAULT_ALIGNMENT,
    order: NeuronOrder | None = None,
    progress: Progress | None = None,
) -> Store:
    """Convert a Hugging Face checkpoint directory into the store `out`, or resume doing so.

    An `out` that already is a store of the same source and parameters is returned as it is.
    `progress` hears the stages "resume", "bundles" and "resident" in bytes.

    Raises CheckpointError or UnsupportedModel for the checkpoint, UsageError for an `out` or a
    parameter that cannot be, StoreIncomplete for an interrupted conversion with other parameters,
    DiskFull when the disk is or will be full; what is written then resumes.
    """
    out = Path(os.path.abspath(out))  # so that it has a name and a parent
    plan = make_plan(Checkpoint.open(checkpoint), alignment, order)
    existing = _existing(out, plan)
    if existing is not None:
        return existing
    partial = out.with_name(out.name + ".partial")
    with _writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial, "conversion"):
            _write(plan, partial, name, progress or (lambda stage, done, total: None))
            os.rename(partial, out)
            fsync_directory(out.parent)
    (out / PROGRESS).unlink(missing_ok=True)
    return Store.open(out)


def make_plan(checkpoint: Checkpoint, alignment: int, order: NeuronOrder | None = None) -> Plan:
    """Check names, shapes and dtypes of everything that will be read, without reading it.

    Only a head beside a tied embedding is read, to compare the two.
    """
    if alignment <= 0 or alignment & (alignment - 1):
        raise UsageError(f"the alignment must be a power of two, not {alignment}")
    config = _with_generation(checkpoint)
    family = family_of(config)
    model = family.architecture(config)
    prefix = _prefix(checkpoint, family)
    model = replace(model, tied_head=_tied(checkpoint, prefix + family.embedding, model))
    residents = family.resident(config, model)
    first_up = family.ffn(model, 0)[0]
    dtype = checkpoint.entry(prefix + first_up.name, first_up.shape).dtype
    layout = Layout(model.layers, model.d_ff, model.d_model, dtype, alignment)
    _check_order(order, layout)
    parameters = {
        "format_version": FORMAT_VERSION,
        "alignment": alignment,
        "order": "id" if order is None else order.name,
        "order_xxh3_128": None if order is None else xxhash.xxh3_128_hexdigest(order.neurons.tobytes()),
        "source": checkpoint.identity(),
    }
    if "synthetic" in config:  # a synthetic checkpoint's mark: whoever reports on the store shows it
        parameters["synthetic"] = config["synthetic"]
    plan = Plan(checkpoint, family, prefix, model, layout, residents, order, parameters)
    _check_sources(plan)
    checkpoint.release()
    return plan


def _with_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config, with the stop tokens of `generation_config.json` where it has any."""
    config = dict(checkpoint.config)
    path = checkpoint.path / GENERATION_CONFIG
    if path.is_file():
        eos = read_json(path).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    return config


def _prefix(checkpoint: Checkpoint, family: Family) -> str:
    for prefix in family.prefixes:
        if prefix + family.embedding in checkpoint.entries:
            return prefix
    raise CheckpointError(
        f"the checkpoint {checkpoint.path} lacks the tensor {family.prefixes[0]}{family.embedding}"
    )


def _tied(checkpoint: Checkpoint, embedding: str, model: Architecture) -> bool:
    """Whether the head is the embedding. As transformers 5 does, the tensors decide over the config."""
    shape = (model.vocabulary, model.embed_dim)
    if HEAD_SOURCE not in checkpoint.entries and model.tied_head:
        return True
    head = checkpoint.entry(HEAD_SOURCE, shape)
    if checkpoint.entry(embedding, shape).dtype != head.dtype:
        return False  # refused later, as a mixture of dtypes
    pairs = zip(checkpoint.chunks(embedding), checkpoint.chunks(HEAD_SOURCE), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


def _check_order(order: NeuronOrder | None, layout: Layout) -> None:
    if order is None:
        return
    neurons = order.neurons
    if neurons.dtype != np.int32 or neurons.shape != (layout.layers, layout.d_ff) or order.name == "id":
        raise UsageError("the neuron order must be int32 of shape [layers, d_ff], under a name of its own")
    if not np.array_equal(np.sort(neurons, axis=1), np.tile(np.arange(layout.d_ff), (layout.layers, 1))):
        raise UsageError("the neuron order is not a permutation of the neurons in every layer")


def _check_sources(plan: Plan) -> None:
    """Every source present, of its shape, all of one dtype."""
    for source in _sources(plan):
        entry = plan.checkpoint.entry(plan.full_name(source.name), source.shape)
        if entry.dtype != plan.layout.dtype:
            raise UnsupportedModel(
                f"{entry.shard}: {plan.full_name(source.name)} is {entry.dtype} where the FFN is "
                f"{plan.layout.dtype}; checkpoints of mixed dtypes are not supported"
            )


def _sources(plan: Plan) -> Iterator[Source]:
    for item in plan.residents:
        yield from item.sources
    for layer in range(plan.architecture.layers):
        yield from plan.family.ffn(plan.architecture, layer)


def _existing(out: Path, plan: Plan) -> Store | None:
    """The store at `out` if it is this conversion's result. Raises UsageError if it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is not a store: choose another directory")
    try:
        store = Store.open(out)
    except StoreError as error:
        raise UsageError(f"{out} exists and is damaged ({error}): remove it to convert again") from error
    if store.manifest.parameters != plan.parameters:
        raise UsageError(
            f"{out} is a store of another checkpoint or of other conversion parameters: "
            "choose another directory"
        )
    return store


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Turn the system's refusals into DiskFull or StoreError; what is written stays, and resumes."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreError(f"{partial} cannot be written: {error.strerror}") from error
        raise DiskFull(
            f"no space left for {partial} ({error.strerror}); make room and run the same command again "
            "to resume"
        ) from error


def _write(plan: Plan, partial: Path, name: str, progress: Progress) -> None:
    """Fill `partial` up to and including the manifest."""
    recorded = _recorded(partial, plan)
    _check_space(plan, partial)
    _record(partial, recorded)
    files = _bundles(plan, partial, recorded, progress)
    if plan.order is not None:
        files[ORDER] = _whole(partial, ORDER, plan.order.neurons.tobytes())
    files[RESIDENT] = _resident(plan, partial, recorded, progress)
    for copied in tokenizer.copy(plan.checkpoint.path, partial):
        files[copied] = _synced(partial / copied)
    manifest = Manifest(
        architecture=plan.architecture,
        layout=plan.layout,
        order="id" if plan.order is None else plan.order.name,
        name=name,
        files=files,
        parameters=plan.parameters,
    )
    _replace(partial / MANIFEST, manifest.to_json())


def _recorded(partial: Path, plan: Plan) -> dict[str, Any]:
    """`progress.json`: parameters, complete layers, the resident file once it is whole."""
    path = partial / PROGRESS
    if not path.is_file():
        if any(file.name != PROGRESS + TEMPORARY for file in partial.iterdir()):
            raise UsageError(f"{partial} exists and is not an interrupted conversion: remove it")
        return {"parameters": plan.parameters, "layers": 0, "resident": None}
    try:
        recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = recorded["parameters"] == plan.parameters and type(recorded["layers"]) is int
    except (ValueError, KeyError, TypeError) as error:
        raise StoreIncomplete(f"{path} is damaged: remove {partial} to convert from the start") from error
    if not same:
        raise StoreIncomplete(
            f"{partial} was started from another checkpoint or with other parameters: "
            "use those, or remove it to convert from the start"
        )
    return recorded


def _record(partial: Path, recorded: dict[str, Any]) -> None:
    _replace(partial / PROGRESS, recorded)


def _replace(path: Path, data: dict[str, Any]) -> None:
    """Write JSON durably and atomically."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def _check_space(plan: Plan, partial: Path) -> None:
    written = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
    needed = plan.total_bytes + SLACK_BYTES - written
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise DiskFull(
            f"converting to {partial.parent} needs {needed / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB free; make room and run the same command again"
        )


def _bundles(plan: Plan, partial: Path, recorded: dict[str, Any], progress: Progress) -> dict[str, FileEntry]:
    """Write `bundles.bin` and `checksums.bin`, from the first layer that is not yet whole."""
    layout = plan.layout
    path, sums_path = partial / BUNDLES, partial / CHECKSUMS
    path.touch()
    sums_path.touch()
    with path.open("r+b") as file, sums_path.open("r+b") as sums:
        done, digest = _rehash(layout, recorded["layers"], file, sums, progress)
        file.truncate(layout.offset(done, 0))
        sums.truncate(done * layout.d_ff * 8)
        file.seek(0, os.SEEK_END)
        sums.seek(0, os.SEEK_END)
        for layer in range(done, layout.layers):
            progress("bundles", layout.offset(layer, 0), layout.total_bytes)
            for block in _layer(plan, layer):
                file.write(block.data)
                digest.update(block.data)
                sums.write(checksums(block).data)
            for written in (file, sums):
                written.flush()
                os.fsync(written.fileno())
            recorded["layers"] = layer + 1
            _record(partial, recorded)
        progress("bundles", layout.total_bytes, layout.total_bytes)
        sums.seek(0)
        entry = FileEntry(layout.total_bytes, digest.hexdigest())
        return {BUNDLES: entry, CHECKSUMS: _entry(sums.read())}


def _rehash(
    layout: Layout, layers: int, file: BinaryIO, sums: BinaryIO, progress: Progress
) -> tuple[int, xxhash.xxh3_128]:
    """The leading layers of `layers` whose bundles match their checksums, and the hash of their bytes."""
    digest = xxhash.xxh3_128()
    for layer in range(layers):
        progress("resume", layout.offset(layer, 0), layout.offset(layers, 0))
        whole = digest.copy()
        for start, stop in spans(layout):
            block = np.frombuffer(file.read((stop - start) * layout.stride), np.uint8)
            expected = np.frombuffer(sums.read((stop - start) * 8), "<u8")
            if block.size != (stop - start) * layout.stride:
                return layer, whole
            if not np.array_equal(checksums(block.reshape(stop - start, -1)), expected):
                return layer, whole
            digest.update(block.data)
    return layers, digest


def _layer(plan: Plan, layer: int) -> Iterator[npt.NDArray[np.uint8]]:
    sources = plan.family.ffn(plan.architecture, layer)
    up, down = (plan.checkpoint.read(plan.full_name(source.name)) for source in sources)
    plan.checkpoint.release()
    return assemble(plan.layout, up, down, None if plan.order is None else plan.order.neurons[layer])


def _resident(plan: Plan, partial: Path, recorded: dict[str, Any], progress: Progress) -> FileEntry:
    path, total = partial / RESIDENT, resident.size(plan.residents, plan.layout.dtype)
    if recorded["resident"] is not None and path.is_file() and path.stat().st_size == total:
        return FileEntry(**recorded["resident"])
    with path.open("wb") as file:
        entry = resident.write(
            file,
            plan.residents,
            plan.layout.dtype,
            plan.checkpoint,
            plan.full_name,
            lambda done: progress("resident", done, total),
        )
        file.flush()
        os.fsync(file.fileno())
    recorded["resident"] = asdict(entry)
    _record(partial, recorded)
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
