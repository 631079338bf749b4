"""Reading checkpoints: every container gives the same bits, every damage one clear sentence."""

from __future__ import annotations

import fractions
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, write_checkpoint
from safetensors.torch import load_file, save_file

from storage.checkpoint import Checkpoint
from storage.convert import convert
from storage.convert.conversion import check
from storage.errors import CheckpointError, UnsupportedModel
from storage.json_object import unreadable
from storage.manifest import RESIDENT
from storage.tensors import Tensors


def plan(directory: Path) -> Any:
    return check(Checkpoint.open(directory), 512)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_container_gives_the_same_bits(tmp_path: Path, dtype: str) -> None:
    kinds = [(sharded, bin) for sharded in (False, True) for bin in (False, True)]
    opened = [
        Checkpoint.open(
            write_checkpoint(tmp_path / f"{sharded}{bin}", "opt", dtype, sharded=sharded, bin=bin)
        )
        for sharded, bin in kinds
    ]
    expected = load_file(tmp_path / "FalseFalse" / "model.safetensors")
    for (sharded, _), checkpoint in zip(kinds, opened, strict=True):
        assert (len(checkpoint.shards) > 1) == sharded
        assert checkpoint.entries.keys() == expected.keys()
        for name, tensor in expected.items():
            array = checkpoint.read(name)
            assert checkpoint.entry(name).dtype == dtype
            assert array.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
            assert np.concatenate(list(checkpoint.chunks(name, 1000))).tobytes() == array.tobytes()


def test_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "opt", "bfloat16", bin=True)
    state = torch.load(directory / "pytorch_model.bin", weights_only=True)
    name = "model.decoder.layers.0.fc2.weight"
    expected = state[name].clone()
    state[name] = expected.T.contiguous().T
    torch.save(state, directory / "pytorch_model.bin")
    read = Checkpoint.open(directory).read(name)
    assert (read == expected.view(torch.uint16).numpy()).all()


def test_identity_follows_the_content_not_the_place(tmp_path: Path) -> None:
    first = Checkpoint.open(write_checkpoint(tmp_path / "a")).identity()
    assert Checkpoint.open(write_checkpoint(tmp_path / "b")).identity() == first
    assert Checkpoint.open(write_checkpoint(tmp_path / "c", seed=1)).identity() != first


def damage_directory(directory: Path, weights: Path) -> Path:
    return directory / "absent"


def damage_config(directory: Path, weights: Path) -> Path:
    (directory / "config.json").unlink()
    return directory


def damage_config_text(directory: Path, weights: Path) -> Path:
    (directory / "config.json").write_text("{")
    return directory


def damage_weights(directory: Path, weights: Path) -> Path:
    weights.unlink()
    return directory


def damage_end(directory: Path, weights: Path) -> Path:
    os.truncate(weights, weights.stat().st_size - 1)
    return directory


def damage_header(directory: Path, weights: Path) -> Path:
    os.truncate(weights, 100)
    return directory


def damage_header_text(directory: Path, weights: Path) -> Path:
    weights.write_bytes(struct.pack("<Q", 16) + b"\xff" * 16)
    return directory


def damage_offsets(directory: Path, weights: Path) -> Path:
    header = json.dumps({"x": {"dtype": "F16", "shape": [4], "data_offsets": [0, 6]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 6)
    return directory


def damage_pointer(directory: Path, weights: Path) -> Path:
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return directory


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_directory, ["absent does not exist"]),
        (damage_config, ["has no config.json"]),
        (damage_config_text, ["config.json cannot be read"]),
        (damage_weights, ["none of model.safetensors", "pytorch_model.bin"]),
        (damage_end, ["model.safetensors is truncated"]),
        (damage_header, ["model.safetensors is truncated"]),
        (damage_header_text, ["model.safetensors has a damaged safetensors header"]),
        (damage_offsets, ["model.safetensors has a damaged safetensors header"]),
        (damage_pointer, ["model.safetensors is a Git LFS pointer"]),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, words: list[str]) -> None:
    directory = write_checkpoint(tmp_path / "model")
    directory = damage(directory, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        plan(directory)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bin", [False, True])
def test_a_missing_shard_is_named(tmp_path: Path, bin: bool) -> None:
    directory = write_checkpoint(tmp_path / "model", sharded=True, bin=bin)
    shard = sorted(directory.glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        plan(directory)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", sharded=True)
    shards = sorted(directory.glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match=f"{shards[0].name} lacks the tensor|{shards[1].name} lacks"):
        plan(directory)


@pytest.mark.parametrize("weight_map", [None, {"x": "../model.safetensors"}, {"x": 1}])
def test_an_index_that_is_not_one(tmp_path: Path, weight_map: Any) -> None:
    directory = write_checkpoint(tmp_path / "model", sharded=True)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read: it has no valid weight_map"):
        plan(directory)


class Attack:
    """Runs code when unpickled plainly."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.witness),))


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    directory, witness = write_checkpoint(tmp_path / "model", bin=True), tmp_path / "witness"
    torch.save({"x": Attack(witness)}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        plan(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Attack(witness)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        plan(directory)
    assert not witness.exists()


def test_a_truncated_bin_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", bin=True)
    weights = directory / "pytorch_model.bin"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        plan(directory)


def test_what_torch_refuses_is_a_sentence_of_ours(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", bin=True)
    state = torch.load(directory / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "note": fractions.Fraction(1, 2)}, directory / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="holds objects other than tensors, which could run any"
    ) as error:
        plan(directory)
    assert not {"\x1b", "\n"} & set(str(error.value))
    assert "option" not in str(error.value)


def test_what_others_say_comes_without_codes_for_a_terminal() -> None:
    with pytest.raises(CheckpointError, match=r"^x cannot be read: not this one$"):
        unreadable(Path("x"), ValueError("not \x1b[1;31mthis\x1b[0m one\nbut that"))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bin_of_torch_before_1_6_is_read(tmp_path: Path, sharded: bool) -> None:
    """Which was no zip file."""
    new = write_checkpoint(tmp_path / "new", sharded=sharded, bin=True)
    old = write_checkpoint(tmp_path / "old", sharded=sharded, bin=True)
    for file in old.glob("*.bin"):
        state = torch.load(file, weights_only=True)
        torch.save(state, file, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(file)
    first, second = Checkpoint.open(new), Checkpoint.open(old)
    assert first.entries.keys() == second.entries.keys()
    for name in first.entries:
        assert first.read(name).tobytes() == second.read(name).tobytes()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        plan(old)


@pytest.mark.parametrize("bin", [False, True])
def test_a_tied_head_that_only_the_index_has(tmp_path: Path, bin: bool) -> None:
    for variant in ("opt", "opt-untied"):
        directory = write_checkpoint(tmp_path / variant, variant, sharded=True, bin=bin)
        index = next(directory.glob("*.index.json"))
        data = json.loads(index.read_text())
        data["weight_map"]["lm_head.weight"] = sorted(data["weight_map"].values())[-1]
        index.write_text(json.dumps(data))
        if variant == "opt":
            assert plan(directory).architecture.tied_head
            continue
        for shard in directory.glob("*.safetensors"):  # it must be there after all
            tensors = {name: one for name, one in load_file(shard).items() if name != "lm_head.weight"}
            save_file(tensors, shard)
        if not bin:
            with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
                plan(directory)


def rewrite(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


FC1 = "model.decoder.layers.1.fc1.weight"
NORM = "model.decoder.layers.1.final_layer_norm.weight"


@pytest.mark.parametrize("name", [FC1, NORM, "model.decoder.embed_tokens.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path / "model")
    rewrite(directory, name, None)
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        plan(directory)


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "opt-untied")
    rewrite(directory, "lm_head.weight", None)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        plan(directory)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    rewrite(directory, FC1, torch.zeros(64, 192))
    with pytest.raises(CheckpointError, match=rf"{FC1} has the shape \[64, 192\] .* \[192, 64\]"):
        plan(directory)


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_an_unsupported_dtype_is_named(tmp_path: Path, dtype: torch.dtype, bin: bool) -> None:
    directory = write_checkpoint(tmp_path / "model")
    tensors = {name: t.to(dtype) for name, t in load_file(directory / "model.safetensors").items()}
    if bin:
        (directory / "model.safetensors").unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"has the dtype .*; supported are float32, float16, bfloat16"):
        plan(directory)


def test_every_tensor_may_have_its_own_dtype(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype="float16")
    rewrite(directory, NORM, torch.ones(64))
    dtypes = {one.tensor.name: one.dtype for one in plan(directory).residents}
    assert dtypes.pop("layers.1.ffn_norm.weight") == "float32"
    assert set(dtypes.values()) == {"float16"}


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_in_one_tensor_become_the_one_that_holds_all(tmp_path: Path, other: torch.dtype) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype="float16")
    before = load_file(directory / "model.safetensors")
    key = "model.decoder.layers.1.self_attn.k_proj.weight"
    rewrite(directory, key, before[key].to(other))
    store = convert(directory, tmp_path / "store", name="x")
    resident = Tensors(store.path / RESIDENT)
    parts = [before[key.replace("k_proj", f"{part}_proj")] for part in "qkv"]
    parts[1] = parts[1].to(other)
    assert resident.dtype("layers.1.qkv.weight") == "float32"
    wanted = torch.cat([part.float() for part in parts]).numpy()
    assert (resident.read("layers.1.qkv.weight") == wanted).all()
