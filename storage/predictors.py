"""Predictors' files between stores of the same weights: each is bound to its store's bundles.

Predictors score approximately, so those of the weights as they were serve rounded ones as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from storage import files, shadow
from storage.bundles import BLOCK_BYTES
from storage.errors import StoreCorrupt, StoreError, UsageError, reason
from storage.store import Store
from storage.tensors import Tensors

SUM = "xxh3_128"  # in the metadata: the hash of all bytes behind the header


def copy_all(source: Store, target: Store) -> list[str]:
    """Copy every predictor file of `source`, bound to `target`; returns their names.

    Raises UsageError for stores of different checkpoints or units, StoreError for a damaged file.
    """
    if source.manifest.parameters.get("source") != target.manifest.parameters.get("source"):
        raise UsageError(f"{source.path} and {target.path} were converted from different checkpoints")
    if source.layout.units != target.layout.units:
        raise UsageError(f"the units of {source.path} are not those of {target.path}")
    names = []
    for path in sorted(source.predictors("any").parent.glob("*.safetensors")):
        if Tensors(path).metadata.get("kind") == shadow.KIND:  # whose rows are those of its own store
            continue
        install(target, path.stem, path)
        names.append(path.stem)
    return names


def install(store: Store, name: str, file: Path) -> None:
    """Copy a predictors' file into the store under this name, when it is new. Raises StoreError."""
    target = store.predictors(name)
    try:
        data = bound(store.identity, file.read_bytes())
        if target.is_file() and target.read_bytes() == data:
            return
        target.parent.mkdir(exist_ok=True)
        files.write_whole(target, data, shared=True)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {reason(error)}") from error


def check_sum(file: Tensors) -> None:
    """Compare the tensors with the hash in the metadata, where there is one. Raises StoreCorrupt."""
    said = file.metadata.get(SUM)
    if said is None:  # of an earlier version
        return
    digest = xxhash.xxh3_128()
    with file.path.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        for block in files.blocks(opened, BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != said:
        raise StoreCorrupt(f"{file.path} does not match its own hash: run.py train-predictor makes it anew")


def bound(identity: str, data: bytes) -> bytes:
    """A predictors' file, safetensors, with its store's identity and its own hash in its metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] |= {"store": identity, SUM: xxhash.xxh3_128_hexdigest(data[start:])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
