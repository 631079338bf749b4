"""convert: every byte arrives, any interruption resumes, nothing unfinished is taken for a store."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from checkpoints import DTYPES, GATED, MIXTURES, VARIANTS, write_checkpoint
from safetensors.torch import load_file

from storage.convert import NeuronOrder, convert
from storage.errors import CheckpointError, DiskFull, StoreError, StoreIncomplete, UsageError
from storage.layout import ROLES
from storage.old_tokenizer import byte_level_bpe
from storage.store import Store
from storage.verify import verify

ROOT = Path(__file__).resolve().parents[1]

# Converts argv[1] into argv[2]; at its argv[3]-th durable operation it kills itself, or with
# argv[4] no file may grow beyond that many bytes. argv[5] is the number of bits.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
from storage.convert import convert
from storage.errors import DiskFull

countdown = int(sys.argv[3])
def counted(function):
    def call(*arguments):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
for name in ("fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
limit, bits = (int(text) or None for text in (*sys.argv[4:], "0", "0")[:2])
if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), name="child", bits=bits)
except DiskFull as error:
    sys.exit(f"DiskFull: {error}")
"""


def child(model: Path, out: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(out), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "opt", "float16")


FFN = {  # how the names of a family's FFN tensors end, in the order of a unit's rows
    "opt": ("fc1", "fc2"),
    "falcon": ("h_to_4h", "4h_to_h"),
    "gated": ("gate_proj", "up_proj", "down_proj"),
    "phi3": ("gate_up_proj", "down_proj"),
}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, DTYPES[index % 3]) for index, variant in enumerate(VARIANTS) if variant not in MIXTURES],
)
def test_every_bit_arrives(tmp_path: Path, variant: str, dtype: str) -> None:
    model = write_checkpoint(tmp_path / "model", variant, dtype)
    store = convert(model, tmp_path / "store", name=variant)
    verify(store.path)
    source = load_file(model / "model.safetensors")
    stored = load_file(store.path / "resident.safetensors")
    used = []
    ends = FFN[
        "phi3"
        if variant.startswith("phi3")
        else "gated"
        if variant in GATED
        else variant.split("-", maxsplit=1)[0]
    ]
    for layer in range(len(store.layout.layers)):
        names = [
            next(name for name in source if f".{layer}." in name and name.endswith(f"{end}.weight"))
            for end in ends
        ]
        used += names
        *ups, down = (source[name] for name in names)
        if len(ends) == 2 and variant in GATED:  # gate and up are one tensor
            ups = ups[0].chunk(2)
        *rows, downs = store.ffn(layer, *ROLES[store.architecture.layers[layer].ffn.kind])
        for stored_rows, tensor in zip(rows, ups, strict=True):
            assert stored_rows.values.tobytes() == bits(tensor).tobytes()
        assert downs.values.tobytes() == bits(down.T.contiguous()).tobytes()
    made = 4 * len(store.layout.layers) + 2 if variant == "opt-no-affine" else 0  # norms that have no source
    plain = [value for name, value in stored.items() if not made or "norm" not in name]
    assert len(stored) - len(plain) == made
    everything = [tensor for name, tensor in source.items() if name not in used]
    assert sorted_bits(plain).tobytes() == sorted_bits(everything).tobytes()


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.uint16).numpy()


def sorted_bits(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.sort(np.concatenate([bits(tensor).reshape(-1) for tensor in tensors]))


def test_layout_on_disk(model: Path, tmp_path: Path) -> None:
    """FORMAT.md, byte by byte, for one bundle at an alignment that needs padding."""
    store = convert(model, tmp_path / "store", name="tiny", alignment=4096)
    raw = (store.path / "bundles.bin").read_bytes()
    assert len(raw) == 3 * 192 * 4096
    bundle = raw[(2 * 192 + 7) * 4096 :][:4096]
    source = load_file(model / "model.safetensors")
    up = bits(source["model.decoder.layers.2.fc1.weight"])[7].tobytes()
    down = bits(source["model.decoder.layers.2.fc2.weight"])[:, 7].tobytes()
    assert bundle == up + down + bytes(4096 - 256)
    sums = np.fromfile(store.path / "checksums.bin", "<u8")
    assert sums[2 * 192 + 7] == xxhash.xxh3_64_intdigest(bundle)
    assert store.identity == xxhash.xxh3_128_hexdigest(raw)
    assert json.loads((store.path / "manifest.json").read_text())["name"] == "tiny"


def test_containers_give_one_store(tmp_path: Path) -> None:
    files = [
        convert(
            write_checkpoint(
                tmp_path / f"{sharded}{bin}", "falcon-40b", "bfloat16", sharded=sharded, bin=bin
            ),
            tmp_path / f"{sharded}{bin}.store",
            name="x",
        ).manifest.files
        for sharded in (False, True)
        for bin in (False, True)
    ]
    assert all(other == files[0] for other in files)


def test_neuron_order(model: Path, tmp_path: Path) -> None:
    plain = convert(model, tmp_path / "plain", name="x")
    neurons = np.random.default_rng(0).permuted(np.tile(np.arange(192, dtype=np.int32), (3, 1)), axis=1)
    ordered = convert(model, tmp_path / "ordered", name="x", order=NeuronOrder("random", neurons))
    verify(ordered.path)
    assert ordered.identity != plain.identity
    for layer in range(3):
        assert (ordered.read_layer(layer) == plain.read_layer(layer)).all()
    neurons[1, 0] = neurons[1, 1]
    with pytest.raises(UsageError, match="not a permutation"):
        convert(model, tmp_path / "bad", name="x", order=NeuronOrder("random", neurons))


def test_progress_covers_every_byte(model: Path, tmp_path: Path) -> None:
    heard: dict[str, list[tuple[int, int]]] = {}
    store = convert(
        model,
        tmp_path / "store",
        name="x",
        progress=lambda stage, done, total: heard.setdefault(stage, []).append((done, total)),
    )
    assert list(heard) == ["bundles", "resident"]
    for stage, name in (("bundles", "bundles.bin"), ("resident", "resident.safetensors")):
        assert heard[stage] == sorted(heard[stage])
        assert heard[stage][-1] == (store.manifest.files[name].bytes,) * 2


def test_resumes_after_kills_at_every_durable_operation(model: Path, tmp_path: Path) -> None:
    """Killed at operation 1, 2, 3, … of each attempt, until one attempt has nothing left to be killed at."""
    expected = convert(model, tmp_path / "expected", name="child")
    out, kills = tmp_path / "store", 0
    while (finished := child(model, out, kills + 1)).returncode == -signal.SIGKILL:
        kills += 1
        if not out.exists():
            with pytest.raises(StoreError):
                Store.open(out)
        assert kills < 60
    assert finished.returncode == 0, finished.stderr
    assert kills > 5
    verify(out)
    assert contents(out) == contents(expected.path)


def test_a_killed_conversion_says_how_to_resume(model: Path, tmp_path: Path) -> None:
    assert child(model, tmp_path / "store", 12).returncode == -signal.SIGKILL
    with pytest.raises(StoreIncomplete, match="was interrupted; run the same"):
        Store.open(tmp_path / "store")
    with pytest.raises(StoreError, match="is not a store"):
        Store.open(tmp_path / "store.partial")


@pytest.fixture
def interrupted(model: Path, tmp_path: Path) -> Path:
    """`store.partial`, killed with at least one layer complete and one incomplete."""
    assert child(model, tmp_path / "store", 12).returncode == -signal.SIGKILL
    partial = tmp_path / "store.partial"
    assert 0 < json.loads((partial / "progress.json").read_text())["layers"] < 3
    return partial


def test_resume_does_not_write_complete_layers_again(model: Path, interrupted: Path) -> None:
    stages: list[tuple[str, int]] = []
    out = interrupted.with_name("store")
    convert(model, out, name="x", progress=lambda stage, done, total: stages.append((stage, done)))
    assert stages[0] == ("resume", 0)
    assert min(done for stage, done in stages if stage == "bundles") > 0


@pytest.mark.parametrize("garbage", [b"", b"half a bundle"])
def test_resume_repairs_what_was_damaged(
    model: Path, interrupted: Path, tmp_path: Path, garbage: bytes
) -> None:
    """A bad byte in a complete layer, and rubbish at the end, do not reach the store."""
    with (interrupted / "bundles.bin").open("r+b") as file:
        if not garbage:
            file.write(b"\xff\xff")
        file.seek(0, os.SEEK_END)
        file.write(garbage)
    store = convert(model, tmp_path / "store", name="child")
    assert contents(store.path) == contents(convert(model, tmp_path / "whole", name="child").path)


def test_resume_with_other_parameters_is_refused(model: Path, interrupted: Path) -> None:
    before = contents(interrupted)
    with pytest.raises(StoreIncomplete, match="with other parameters"):
        convert(model, interrupted.with_name("store"), name="x", alignment=1024)
    write_checkpoint(model, "opt", "float16", seed=1)
    with pytest.raises(StoreIncomplete, match="another checkpoint"):
        convert(model, interrupted.with_name("store"), name="x")
    assert contents(interrupted) == before


def test_a_damaged_progress_file_is_named(model: Path, interrupted: Path) -> None:
    (interrupted / "progress.json").write_text("{")
    with pytest.raises(StoreIncomplete, match=r"progress\.json is damaged"):
        convert(model, interrupted.with_name("store"), name="x")


def test_two_conversions_at_once_are_refused(model: Path, interrupted: Path) -> None:
    descriptor = os.open(interrupted, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another conversion"):
            convert(model, interrupted.with_name("store"), name="x")
    finally:
        os.close(descriptor)


def test_an_existing_store_is_returned_or_respected(model: Path, tmp_path: Path) -> None:
    store = convert(model, tmp_path / "store", name="x")
    before = {path: path.stat().st_mtime_ns for path in store.path.iterdir()}
    again = convert(model, tmp_path / "store", name="x")
    assert again == store
    with pytest.raises(UsageError, match="store of another checkpoint or of other conversion parameters"):
        convert(model, tmp_path / "store", name="x", alignment=1024)
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="store of another checkpoint"):
        convert(other, tmp_path / "store", name="x")
    assert {path: path.stat().st_mtime_ns for path in store.path.iterdir()} == before
    assert not (tmp_path / "store.partial").exists()


def test_other_peoples_directories_are_respected(model: Path, tmp_path: Path) -> None:
    for name in ("taken", "free.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("dear …")
    with pytest.raises(UsageError, match="exists and is not a store"):
        convert(model, tmp_path / "taken", name="x")
    with pytest.raises(UsageError, match="is not an interrupted conversion"):
        convert(model, tmp_path / "free", name="x")
    assert contents(tmp_path / "taken").keys() == contents(tmp_path / "free.partial").keys() == {"letter.txt"}


def test_an_empty_directory_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    verify(convert(model, tmp_path / "store", name="x").path)


def test_a_bad_checkpoint_leaves_nothing(model: Path, tmp_path: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)
    with pytest.raises(CheckpointError):
        convert(model, tmp_path / "store", name="x")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("alignment", [0, -512, 1000])
def test_alignment_is_checked(model: Path, tmp_path: Path, alignment: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        convert(model, tmp_path / "store", name="x", alignment=alignment)


@pytest.mark.parametrize("file", ["bundles.bin", "resident.safetensors"])
def test_a_disk_that_fills_up(tmp_path: Path, file: str) -> None:
    """A limit on file sizes stands in for the disk: it binds root, too."""
    model, out = write_checkpoint(tmp_path / "model", "opt", "float32"), tmp_path / "store"
    expected = convert(model, tmp_path / "expected", name="x")
    sizes = {name: entry.bytes for name, entry in expected.manifest.files.items()}
    assert sizes["resident.safetensors"] > sizes["bundles.bin"]
    full = child(model, out, 0, sizes[file] - 1)
    assert full.returncode == 1
    assert full.stderr.startswith("DiskFull: no space left for")
    assert full.stderr.count("\n") == 1
    with pytest.raises(StoreIncomplete):
        Store.open(out)
    assert contents(convert(model, out, name="x").path) == contents(expected.path)


def test_free_space_is_checked_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(DiskFull, match=r"needs 0\.1 GB more and the disk has 0\.0 GB free"):
        convert(model, tmp_path / "store", name="x")
    assert not (tmp_path / "store").exists()
    monkeypatch.undo()
    verify(convert(model, tmp_path / "store", name="x").path)


def test_a_directory_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"store\.partial cannot be written: Not a directory"):
        convert(model, tmp_path / "file" / "store", name="x")


def test_the_tokenizer_is_copied(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "special_tokens_map.json").write_text("{}")
    store = convert(model, tmp_path / "store", name="x")
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        assert (store.path / name).read_bytes() == (model / name).read_bytes()
        assert name in store.manifest.files


def test_the_tokenizer_is_built_from_the_old_files(model: Path, tmp_path: Path) -> None:
    """As facebook/opt-* ship it; ids as transformers' GPT-2 tokenizer gives them."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import GPT2Tokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(["the cat sat on the mat, the cat"] * 9, 300, 2, special_tokens=special)
    trained.save_model(str(model))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "</s>"}, "add_bos_token": True})
    )
    store = convert(model, tmp_path / "store", name="x")
    built = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    theirs = GPT2Tokenizer(
        vocab=str(model / "vocab.json"), merges=str(model / "merges.txt"), bos_token="</s>", unk_token="</s>"
    )
    for text in ("The cat sat", " the mat,  naïve\n🐈", ""):
        ids = built.encode(text).ids
        assert ids == [2, *theirs(text, add_special_tokens=False).input_ids]
        assert built.decode(ids) == text
    (model / "merges.txt").write_text("not merges at all\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt cannot be read"):
        byte_level_bpe(model)
