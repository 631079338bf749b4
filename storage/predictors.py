"""Predictors' files between stores of the same weights: each is bound to its store's bundles.

Predictors score approximately, so those of the weights as they were serve rounded ones as well.
"""

from __future__ import annotations

import json
from pathlib import Path

from storage import files, shadow
from storage.errors import StoreError, UsageError, reason
from storage.store import Store
from storage.tensors import Tensors


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


def bound(identity: str, data: bytes) -> bytes:
    """A predictors' file, safetensors, with the identity of their store in its metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"]["store"] = identity
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
