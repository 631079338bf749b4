"""GGUF files of mixtures of experts: the checkpoint's tensors, and published blocks as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import write_checkpoint
from formats import FORMATS, values
from gguf import GGMLQuantizationType
from gguf_files import described_by, of_checkpoint, packed_by_hand, write

from storage.checkpoint import Checkpoint
from storage.convert import convert
from storage.convert.opening import open_origin
from storage.errors import CheckpointError, UnsupportedModel
from storage.gguf.file import GgufFile
from storage.gguf.header import Header
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from storage.verify import verify

# Of each architecture its checkpoints, with what their files cannot say.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {},
    "mixtral": {},
    "mixtral-window": {},
    "olmoe": {},
    "olmoe-biased": {},
    "qwen2-moe": {},
    "granitemoe": {},
    "gpt-oss": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
}
EXTRA = {"olmoe-biased": {"olmoe.expert_weights_norm": True}}
# Whose files have the names that the family's other form has.
RENAMED = ("granitemoe",)
KEPT = {"Q8_0": "q8", "Q4_0": "q4s", "Q4_1": "q4", "Q4_K": "q4", "MXFP4": "mxfp4"}
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}  # whole blocks of every type


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one by one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_is_the_checkpoint_it_was_made_of(tmp_path: Path, variant: str, stacked: bool) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", variant)
    checkpoint = open_origin(directory)
    path = of_checkpoint(directory, tmp_path / "m.gguf", EXTRA.get(variant), stacked=stacked)
    file = GgufFile.open(path)
    assert any("_exps.weight" in tensor.name for tensor in Header.read(path).tensors) == stacked
    if variant not in RENAMED:
        assert set(file.entries) == set(checkpoint.entries)
    for name, entry in checkpoint.entries.items():
        if variant in RENAMED and "_linear" in name:
            continue
        assert file.entry(name, entry.shape).dtype == "float32"
        assert file.read(name).tobytes() == checkpoint.read(name).tobytes()
    described = described_by({**checkpoint.config, **VARIANTS[variant]})
    ours = described_by({**file.config, "eos_token_id": checkpoint.config["eos_token_id"], "bos_token_id": 2})
    assert ours.keys() == described.keys()
    for key, value in described.items():
        assert ours[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_becomes_the_store_of_its_checkpoint(tmp_path: Path, variant: str) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", variant)
    theirs = convert(directory, tmp_path / "theirs", name="x")
    for stacked in (True, False):
        file = of_checkpoint(directory, tmp_path / f"{stacked}.gguf", EXTRA.get(variant), stacked=stacked)
        ours = convert(file, tmp_path / f"ours-{stacked}", name="x")
        for name in ("bundles.bin", "resident.safetensors"):
            assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes()


def repacked(path: Path, kind: str, out: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The file with random blocks of this type for its experts, and their numbers, [E, out, in]."""
    header = Header.read(path)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    numbers: dict[str, np.ndarray] = {}
    for number, tensor in enumerate(header.tensors):
        if "_exps" in tensor.name:
            packed = packed_by_hand(kind, tensor.rows, tensor.columns, seed=number)
            numbers[tensor.name] = gguf.dequantize(packed, GGMLQuantizationType[kind]).reshape(tensor.shape)
            tensors[tensor.name] = (packed.reshape(*tensor.shape[:-1], -1), kind)
            continue
        flat = np.fromfile(path, np.float32, tensor.rows * tensor.columns, offset=tensor.offset)
        tensors[tensor.name] = (flat.reshape(tensor.shape), tensor.kind)
    metadata = {key: value for key, value in header.metadata.items() if key != "general.architecture"}
    return write(out, tensors, metadata, header.metadata["general.architecture"]), numbers


def expert_rows(store: Store, layer: int, role: Any) -> np.ndarray:
    """[experts, rows, bytes], as the store has them."""
    part = store.layout.layers[layer]
    count, _ = part.unit.shape(role)
    (rows,) = store.ffn(layer, role)
    return rows.values.reshape(part.units, count, -1)


def numbers_of(rows: np.ndarray, codec: str) -> np.ndarray:
    """[..., values] of [..., bytes]: by the formats' description, or by the package `gguf`."""
    if codec in FORMATS:
        return values(rows.reshape(-1, rows.shape[-1]), FORMATS[codec]).reshape(*rows.shape[:-1], -1)
    groups = rows.shape[-1] // 17
    codes = rows[..., : 16 * groups].reshape(*rows.shape[:-1], groups, 16)
    blocks = np.concatenate([rows[..., 16 * groups :, None], codes], axis=-1)  # as GGUF has them
    return gguf.dequantize(blocks.reshape(*rows.shape[:-1], -1), GGMLQuantizationType.MXFP4)


@pytest.mark.parametrize("kind", KEPT)
def test_published_blocks_of_experts_are_kept(tmp_path: Path, kind: str) -> None:
    directory = write_checkpoint(
        tmp_path / "checkpoint", "qwen3-moe", changes={**WIDE, "num_hidden_layers": 1}
    )
    path, numbers = repacked(of_checkpoint(directory, tmp_path / "m.gguf"), kind, tmp_path / "packed.gguf")
    store = convert(path, tmp_path / "store", name="x")
    verify(store.path)
    unit = store.layout.layers[0].unit
    assert {row.role: row.codec for row in unit.rows} == dict.fromkeys(("gate", "up", "down"), KEPT[kind])
    assert (store.layout.layers[0].units, unit.width) == (8, 256)
    for role in ("gate", "up", "down"):
        expected = numbers[f"blk.0.ffn_{role}_exps.weight"]
        rows = expert_rows(store, 0, role)
        found = numbers_of(rows, KEPT[kind])
        if kind == "Q4_K":  # its scales and minima are rounded to float16
            assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
        else:
            assert np.array_equal(found.astype(np.float32), expected)


def test_a_router_keeps_its_floats_whatever_the_matrices_have(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", "qwen3-moe")
    for kind, dtype in (("Q8_0", "q8"), ("BF16", "bfloat16"), ("F16", "float16")):
        path = of_checkpoint(directory, tmp_path / f"{kind}.gguf", matrices=kind)
        store = convert(path, tmp_path / kind, name="x")
        places = Tensors(store.path / RESIDENT).places
        assert places["layers.0.router.weight"].dtype == "float32"
        assert {places["layers.0.qkv.weight"].dtype, store.layout.layers[0].unit.rows[0].codec} == {dtype}
        exact = Checkpoint.open(directory).read("model.layers.0.mlp.gate.weight")
        read = GgufFile.open(path).read("model.layers.0.mlp.gate.weight")
        assert read.tobytes() == exact.tobytes()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"qwen3moe.expert_gating_func": 2}, "weights other than by softmax"),
        ({"qwen3moe.expert_weights_scale": 2.5}, "weights that are scaled"),
        ({"qwen3moe.expert_count": 0}, "experts must be a positive integer, not 0"),
    ],
)
def test_what_a_mixture_does_not_support_is_named(
    tmp_path: Path, metadata: dict[str, Any], words: str
) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", "qwen3-moe")
    with pytest.raises(UnsupportedModel, match=words):
        convert(of_checkpoint(directory, tmp_path / "m.gguf", metadata), tmp_path / "store", name="x")


def test_experts_of_a_type_that_is_not_read_are_refused_by_its_name(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", "qwen3-moe", changes={**WIDE, "head_dim": 64})
    path = of_checkpoint(directory, tmp_path / "m.gguf", matrices="TQ2_0")
    with pytest.raises(UnsupportedModel, match=r"has the type TQ2_0; supported are F32, "):
        convert(path, tmp_path / "store", name="x")


def test_fewer_experts_than_promised_are_one_sentence(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", "qwen3-moe")
    path = of_checkpoint(directory, tmp_path / "m.gguf", {"qwen3moe.expert_count": 9})
    with pytest.raises(
        CheckpointError, match=r"ffn_gate_inp.weight has the shape \[8, 64\] .* \[9, 64\]|experts\.8\."
    ):
        convert(path, tmp_path / "store", name="x")
