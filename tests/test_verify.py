"""verify: silent on a good store, precise about a bad one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from damage import flip
from gguf_files import of_checkpoint

from pipeline.cli import main
from storage.convert import NeuronOrder, convert
from storage.errors import StoreCorrupt, StoreError, StoreMissing
from storage.manifest import CHECKSUMS, MANIFEST, SEAL
from storage.store import Store
from storage.tensors import Tensors
from storage.verify import verify
from workers.prefetcher.verifier import Verifier


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return convert(write_checkpoint(tmp_path / "model", "falcon-7b", "float16"), tmp_path / "store", name="x")


def test_a_good_store(store: Store) -> None:
    heard: dict[str, tuple[int, int]] = {}
    verify(store.path, lambda name, done, total: heard.update({name: (done, total)}))
    assert heard.keys() == store.manifest.files.keys()
    assert all(done == total for done, total in heard.values())


def test_a_store_is_found_where_one_stands(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.path)
    verify(Path("."))
    monkeypatch.chdir(store.path.parent)
    for path in (".", "/"):  # neither has a name of its own
        with pytest.raises(StoreMissing, match=r"is not a store: it has no manifest\.json"):
            verify(Path(path))


@pytest.mark.parametrize("byte", [0, 200, 511])  # up-projection row, down-projection column, padding
def test_the_first_bad_bundle_is_named(store: Store, byte: int) -> None:
    layout = store.layout
    assert layout.layers[0].unit.bytes < 511 < layout.stride
    bad = layout.offset(1, 70)
    flip(store.path / "bundles.bin", bad + byte)
    flip(store.path / "bundles.bin", layout.offset(2, 3))
    with pytest.raises(StoreCorrupt, match=f"layer 1, neuron 70, at byte {bad:,}, does not match"):
        verify(store.path)


FEW_BITS: dict[str, tuple[str, dict[str, int]]] = {  # variant, and what makes rows whole groups
    "q8": ("llama", {"intermediate_size": 256}),
    "q4": ("llama", {"intermediate_size": 256}),
    "q4s": ("opt", {"ffn_dim": 256}),
    "q4 experts": ("qwen3-moe", {}),
    "mxfp4 experts": ("qwen3-moe", {"head_dim": 64}),
}


@pytest.mark.parametrize("part", ["codes", "scales"])
@pytest.mark.parametrize("name", FEW_BITS)
def test_a_flipped_bit_in_few_bits_is_found(tmp_path: Path, name: str, part: str) -> None:
    """In a unit's codes or scales, when all is verified and when it is read; and in resident rows."""
    variant, changes = FEW_BITS[name]
    codec = name.removesuffix(" experts")
    source = write_checkpoint(tmp_path / "model", variant, "float16", changes=changes)
    if codec == "mxfp4":
        store = convert(
            of_checkpoint(source, tmp_path / "m.gguf", matrices="MXFP4"), tmp_path / "s", name="x"
        )
    else:
        store = convert(
            source, tmp_path / "s", name="x", bits=8 if codec == "q8" else 4, small=codec == "q4s"
        )
    verify(store.path)
    layer = store.layout.layers[1]
    assert {row.codec for row in layer.unit.rows} == {codec}
    start, stop = layer.unit.span("up")
    bad = store.layout.offset(1, 2)
    flip(store.path / "bundles.bin", bad + (start if part == "codes" else stop - 1))
    kind = "neuron" if layer.unit.width == 1 else "unit"
    with pytest.raises(StoreCorrupt, match=f"layer 1, {kind} 2, at byte {bad:,}, does not match"):
        verify(store.path)
    memory = np.fromfile(store.path / "bundles.bin", np.uint8, layer.bytes, offset=layer.start)
    memory = memory.reshape(layer.units, layer.unit.stride)
    verifier, _ = Verifier.wanted("always", store, memory)
    assert verifier is not None
    ids = np.arange(layer.units, dtype=np.int32)
    assert verifier.wrong(1, ids, ids)[0].tolist() == [2]
    flip(store.path / "bundles.bin", bad + (start if part == "codes" else stop - 1))
    verify(store.path)
    rows = Tensors(store.path / "resident.safetensors").place("layers.1.qkv.weight")
    assert rows.dtype == ("q8" if codec == "q4" else codec)
    flip(
        store.path / "resident.safetensors", rows.offset if part == "codes" else rows.offset + rows.bytes - 1
    )
    with pytest.raises(StoreCorrupt, match=r"resident\.safetensors does not match its hash"):
        verify(store.path)


def test_a_bad_bundle_of_a_reordered_store(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    order = NeuronOrder("reversed", np.tile(np.arange(191, -1, -1, dtype=np.int32), (3, 1)))
    store = convert(model, tmp_path / "store", name="x", order=order)
    verify(store.path)
    flip(store.path / "bundles.bin", store.layout.offset(2, 1))
    with pytest.raises(StoreCorrupt, match=f"layer 2, neuron 190, at byte {store.layout.offset(2, 1):,}"):
        verify(store.path)


@pytest.mark.parametrize("name", ["resident.safetensors", "checksums.bin", "tokenizer.json"])
def test_a_bad_file_is_named(store: Store, name: str) -> None:
    flip(store.path / name, store.manifest.files[name].bytes - 5)
    with pytest.raises(StoreCorrupt, match=f"{name} does not match its hash"):
        verify(store.path)


def test_a_bundle_and_its_checksum_forged_together(store: Store) -> None:
    """The files' hashes still tell."""
    import xxhash

    flip(store.path / "bundles.bin", 7)
    sums = np.fromfile(store.path / "checksums.bin", "<u8")
    first = (store.path / "bundles.bin").read_bytes()[: store.layout.stride]
    sums[0] = xxhash.xxh3_64_intdigest(first)
    sums.tofile(store.path / "checksums.bin")
    with pytest.raises(StoreCorrupt, match=r"checksums\.bin does not match its hash"):
        verify(store.path)


def test_a_truncated_file_is_named(store: Store) -> None:
    os.truncate(store.path / "bundles.bin", store.layout.total_bytes - 512)
    with pytest.raises(StoreError, match=r"bundles\.bin has .* bytes where its manifest says"):
        verify(store.path)


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        verify(tmp_path)


def test_a_wrong_path_is_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """The same for every command that takes a store's directory."""
    missing, text = str(tmp_path / "missing"), str(tmp_path / "missing.txt")
    for arguments in (["verify", missing], ["train-predictor", "--store", missing, "--text", text]):
        monkeypatch.setattr("sys.argv", ["run.py", *arguments])
        assert main() == 2
        assert capfd.readouterr().err == f"flashring: there is no store {missing}\n"
    monkeypatch.setattr("sys.argv", ["run.py", "verify", str(tmp_path)])
    assert main() == 2
    assert "is not a store" in capfd.readouterr().err


def test_checksums_that_are_not_there(store: Store) -> None:
    data = json.loads((store.path / MANIFEST).read_text(encoding="utf-8"))
    del data["files"][CHECKSUMS]
    del data[SEAL]  # as earlier versions wrote it
    (store.path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    (store.path / CHECKSUMS).unlink()
    with pytest.raises(StoreError, match="a checksum for each unit"):
        verify(store.path)
