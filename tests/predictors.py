"""Small predictor files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from storage.manifest import PREDICTORS
from storage.store import Store


def maps(store: Store, prefix: str, layers: range, rank: int = 3, seed: int = 1) -> dict[str, Any]:
    """Random tensors of the layers' maps."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for layer in layers:
        shapes = {"down": (rank, store.architecture.d_model), "up": (store.layout.most_units, rank)}
        for name, shape in shapes.items():
            tensors[f"{prefix}.{layer}.{name}"] = generator.normal(size=shape).astype(np.float16)
        tensors[f"{prefix}.{layer}.bias"] = generator.normal(size=store.layout.most_units).astype(np.float32)
        tensors[f"{prefix}.{layer}.scale"] = np.array([0.5], np.float32)
    return tensors


def write(
    store: Store, tensors: dict[str, Any], name: str = "default", changes: dict[str, str] | None = None
) -> Path:
    """A file of these tensors, of look-ahead 1; `changes` are to its metadata."""
    path = store.path / PREDICTORS / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    described = {"kind": "lowrank", "lookahead": "1", "store": store.identity, "report": "{}"}
    save_file(tensors, path, {**described, **(changes or {})})
    return path
