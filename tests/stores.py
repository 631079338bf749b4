"""Small stores made without a checkpoint: random bundles, no resident tensors worth the name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.architecture import Architecture, Attention, Ffn, Layer, Norm
from storage.layout import Layout, neuron
from storage.manifest import BUNDLES, MANIFEST, ORDER, RESIDENT, FileEntry, Manifest
from storage.store import Store


def architecture(layers: int, d_ff: int, d_model: int) -> Architecture:
    """A ReLU model of these sizes."""
    norm = Norm(1e-5)
    layer = Layer(
        attention=Attention(heads=2, kv_heads=2, head_dim=d_model // 2, scale=(d_model // 2) ** -0.5),
        ffn=Ffn("plain", d_ff, 1, "relu"),
        norms={"attention_input": norm, "ffn_input": norm},
    )
    return Architecture(
        family="opt",
        d_model=d_model,
        vocabulary=64,
        max_positions=64,
        layers=(layer,) * layers,
        final_norm=norm,
        tied_head=True,
        embed_dim=d_model,
        learned_positions=2,
        bos_token=None,
        eos_tokens=(),
    )


def bundle_store(
    path: Path,
    layers: int = 3,
    d_ff: int = 96,
    d_model: int = 128,
    alignment: int = 512,
    shuffled: bool = False,
) -> Store:
    """A float16 store whose bundles are random bytes, written to `path`; it has nothing else.

    `shuffled` gives it an order.bin of random permutations.
    """
    generator = np.random.default_rng(5)
    layout = Layout.uniform(layers, d_ff, neuron("float16", d_model, alignment))
    path.mkdir(parents=True)
    generator.integers(0, 256, layout.total_bytes, np.uint8).tofile(path / BUNDLES)
    (path / RESIDENT).touch()
    files = {BUNDLES: FileEntry(layout.total_bytes, "0" * 32), RESIDENT: FileEntry(0, "0" * 32)}
    if shuffled:
        order = np.array([generator.permutation(d_ff) for _ in range(layers)], np.int32)
        order.tofile(path / ORDER)
        files[ORDER] = FileEntry(order.nbytes, "0" * 32)
    manifest = Manifest(
        architecture=architecture(layers, d_ff, d_model),
        layout=layout,
        order="random" if shuffled else "id",
        name="bundles only",
        files=files,
        parameters={},
    )
    (path / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return Store.open(path)


def raw_bundles(store: Store) -> npt.NDArray[np.uint8]:
    """Every bundle's bytes by layer and neuron id, `[layers, d_ff, stride]`."""
    layout = store.layout
    raw = np.fromfile(store.path / BUNDLES, np.uint8).reshape(
        len(layout.layers), layout.most_units, layout.stride
    )
    positions = store.positions()
    if positions is None:
        return raw
    return np.take_along_axis(raw, np.stack(positions)[:, :, None], axis=1)
