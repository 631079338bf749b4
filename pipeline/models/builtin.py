"""The built-in model: a checkpoint of this package, and the predictors that were trained for it."""

from __future__ import annotations

from pipeline.config import Model
from pipeline.launch import ROOT
from storage import files
from storage.errors import StoreError, reason
from storage.store import Store

NAME = "builtin"
CHECKPOINT = ROOT / "storage" / "builtin"
PREDICTORS = "predictors.safetensors"  # beside the checkpoint; copied into its store


def install_predictors(store: Store) -> None:
    """Copy the built-in model's predictors into its store, when they are new."""
    source = CHECKPOINT / PREDICTORS
    target = store.predictors(Model().predictor)
    if not source.is_file():
        return
    data = source.read_bytes()
    if target.is_file() and target.read_bytes() == data:
        return
    target.parent.mkdir(exist_ok=True)
    try:
        files.write_whole(target, data, shared=True)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {reason(error)}") from error
