"""The built-in model: a checkpoint of this package, and the predictors that were trained for it."""

from __future__ import annotations

import json

from pipeline.config import Model
from pipeline.launch import ROOT
from storage import files
from storage.errors import StoreError, reason
from storage.rounding import RoundingCost, read_cost, write_cost
from storage.store import Store

NAME = "builtin"
CHECKPOINT = ROOT / "storage" / "builtin"
PREDICTORS = "predictors.safetensors"  # beside the checkpoint; copied into its store
# What `evaluation.bits --save` found on 12,000 tokens of the validation stories (docs/lowbits.md).
COSTS = {
    8: RoundingCost(8, 0.0004, 12_000, "held-out stories"),
    4: RoundingCost(4, 0.0085, 12_000, "held-out stories"),
}


def install(store: Store, bits: int | None) -> None:
    """Give the built-in model's store what was measured and trained for it."""
    _install_predictors(store)
    if bits in COSTS and read_cost(store) is None:
        write_cost(store, COSTS[bits])


def _install_predictors(store: Store) -> None:
    """Copy the predictors into the store, when they are new.

    They were trained on the weights as shipped, and serve those in fewer bits as well (docs/lowbits.md).
    """
    source = CHECKPOINT / PREDICTORS
    target = store.predictors(Model().predictor)
    if not source.is_file():
        return
    data = _bound_to(store.identity, source.read_bytes())
    if target.is_file() and target.read_bytes() == data:
        return
    target.parent.mkdir(exist_ok=True)
    try:
        files.write_whole(target, data, shared=True)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {reason(error)}") from error


def _bound_to(identity: str, data: bytes) -> bytes:
    """A safetensors file's bytes, with the store that its predictors are of in the metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"]["store"] = identity
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
