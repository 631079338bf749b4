"""Writing a synthetic model without experts straight into a store, without a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from storage import tokenizer as tokenizers
from storage.convert.recipe import Recipe
from storage.convert.write import convert_origin
from storage.errors import CheckpointError
from storage.store import Store
from workers.lab.synthesis.checkpoint import Request
from workers.lab.synthesis.drawn import DrawnCheckpoint


def write_store(
    request: Request, recipe: Recipe, out: Path, progress: Callable[[str, int, int], None] | None = None
) -> Store:
    """Write the store `out`, or go on writing it; `progress` hears stage, bytes done and bytes in all.

    It equals the store that a conversion by the same recipe makes of the request's checkpoint, on the same
    machine, but for what the manifest tells of its origin.

    Raises as `storage.convert.convert`, and UsageError for a request that cannot be.
    """
    if request.tokenizer is not None and tokenizers.TOKENIZER not in tokenizers.texts(request.tokenizer):
        raise CheckpointError(f"{request.tokenizer} has no tokenizer.json, nor vocab.json and merges.txt")
    origin = DrawnCheckpoint.of(request, out)
    with torch.no_grad():
        store = convert_origin(origin, out, name=str(origin.path), recipe=recipe, progress=progress)
    shutil.rmtree(origin.scratch, ignore_errors=True)
    return store
