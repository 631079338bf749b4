"""A GGUF file's matrices in the bits that they have: the same numbers, and the same model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from formats import FORMATS, code, values
from gguf import GGMLQuantizationType
from gguf_files import SMALLEST, of_checkpoint, packed_by_hand, write

from storage.codecs import CODECS
from storage.convert import convert
from storage.convert.conversion import check
from storage.convert.rows import unit_rows
from storage.gguf import tensors
from storage.gguf.file import GgufFile
from storage.manifest import RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from storage.verify import verify

EMBED, VALUES = "model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight"
EXACT = {"Q8_0": "q8", "Q5_0": "q8", "Q4_0": "q4s", "Q4_1": "q4"}
ROUNDED = ("Q5_1", "Q5_K", "Q6_K")
PROMPT = [2, *(5 + (17 * i) % 250 for i in range(12))]


def file_of(path: Path, kind: str, rows: int = 32, columns: int = 512) -> tuple[GgufFile, np.ndarray]:
    """A file whose matrices have any codes and finite scales, and those rows as the file has them."""
    packed = packed_by_hand(kind, rows, columns)
    norm = np.ones(columns, np.float32)
    write(
        path,
        {
            "token_embd.weight": (packed, kind),
            "blk.0.attn_norm.weight": (norm, "F32"),
            "blk.0.attn_v.weight": (packed, kind),
        },
        {**SMALLEST, "llama.embedding_length": columns},
    )
    return GgufFile.open(path, keep=True), packed


def dequantised(packed: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(packed, GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", EXACT)
def test_what_has_a_counterpart_loses_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 5 * 512 * 4)  # several chunks, the last one shorter
    file, packed = file_of(tmp_path / "m.gguf", kind)
    form, expected = FORMATS[EXACT[kind]], dequantised(packed, kind)
    for name in (EMBED, VALUES):
        entry, read = file.entry(name, (32, 512)), file.read(name)
        assert entry.dtype == EXACT[kind]
        assert read.shape == (32, form.row_bytes(512))
        assert np.array_equal(values(read, form).astype(np.float32), expected)
        assert file.read(name, 3, 20).tobytes() == read[3:20].tobytes()
        assert np.concatenate(list(file.chunks(name, 7 * 512 * 4))).tobytes() == read.tobytes()
    assert file.entry("model.layers.0.input_layernorm.weight").dtype == "float32"


def six_bits(numbers: np.ndarray, group: int) -> tuple[int, int]:
    """Of a Q4_K block's twelve bytes, a group's scale and minimum, as llama.cpp describes it."""
    low, high = int(numbers[group + 4]), int(numbers[group])
    if group < 4:
        return high & 63, low & 63
    return low & 15 | int(numbers[group - 4]) >> 6 << 4, low >> 4 | high >> 6 << 4


def test_q4_k_keeps_every_code(tmp_path: Path) -> None:
    """Scales and minima are products of a float16 and a whole number, and are rounded to float16."""
    file, packed = file_of(tmp_path / "m.gguf", "Q4_K", rows=4)
    read, form = file.read(VALUES), FORMATS["q4"]
    assert file.entry(VALUES).dtype == "q4"
    blocks = packed.reshape(-1, 144)
    codes = np.array([code(row, place, form) for row in map(bytes, read) for place in range(512)])
    tables = read[:, 256:].reshape(-1).view("<f2").reshape(4, 2, 2, 8).swapaxes(0, 1)  # of both, [4, 2, 8]
    scales, minima = tables.reshape(2, len(blocks), 8)
    steps = np.abs(scales).max() * 2.0**-11
    for number, block in enumerate(blocks):
        for group in range(8):
            packed_codes = block[16 + 32 * (group // 2) :][:32]
            expected = packed_codes >> 4 if group % 2 else packed_codes & 15
            assert np.array_equal(codes[256 * number + 32 * group :][:32], expected)
            scale, minimum = six_bits(block[4:16], group)
            whole, least = block[:4].view("<f2").astype(np.float32)
            assert scales[number, group] == np.float16(whole * np.float32(scale))
            assert minima[number, group] == np.float16(-least * np.float32(minimum))
    off = np.abs(values(read, form) - dequantised(packed, "Q4_K")).max()
    assert 0 < off < 15 * steps + np.abs(minima).max() * 2.0**-11


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_has_no_counterpart_becomes_eight_bits(tmp_path: Path, kind: str) -> None:
    """Within half a step, in the root mean square of a group: the search may clip a value for the others."""
    file, packed = file_of(tmp_path / "m.gguf", kind)
    assert file.entry(VALUES).dtype == "q8"
    expected = dequantised(packed, kind).astype(np.float64).reshape(-1, 32)
    error = values(file.read(VALUES), FORMATS["q8"]).reshape(-1, 32) - expected
    steps = np.abs(expected).max(1) / 127
    assert (np.sqrt(np.square(error).mean(1)) <= 0.501 * steps).all()
    assert file.read(VALUES, 3, 20).tobytes() == file.read(VALUES)[3:20].tobytes()


def test_rows_that_do_not_fit_are_widened(tmp_path: Path) -> None:
    """Kernels take pairs of runs of 32 values: 96 are three runs."""
    file, packed = file_of(tmp_path / "m.gguf", "Q8_0", columns=96)
    assert file.entry(EMBED).dtype == "float16"
    assert np.abs(CODECS["float16"].widen(file.read(EMBED)) - dequantised(packed, "Q8_0")).max() < 2e-3
    assert file_of(tmp_path / "n.gguf", "Q8_0", columns=192)[0].entry(EMBED).dtype == "q8"


def test_floats_are_kept_as_they_are(tmp_path: Path) -> None:
    for kind, dtype in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
        rows = gguf.quantize(np.ones((32, 512), np.float32), GGMLQuantizationType[kind])
        path = write(tmp_path / f"{kind}.gguf", {"token_embd.weight": (rows, kind)}, SMALLEST)
        assert GgufFile.open(path, keep=True).entry(EMBED).dtype == dtype


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 256 neurons a layer, of which 64 are a unit."""
    base = tmp_path_factory.mktemp("kept")
    return write_checkpoint(base / "checkpoint", "llama", changes={"intermediate_size": 256})


def codecs(store: Store) -> dict[str, str]:
    """Of a layer's rows by role, and of resident matrices by what their names end in."""
    found = {row.role: row.codec for row in store.layout.layers[0].unit.rows}
    places = Tensors(store.path / RESIDENT).places
    return found | {name: place.dtype for name, place in places.items() if len(place.shape) == 2}


@pytest.mark.parametrize(("kind", "codec"), [*EXACT.items(), ("Q5_1", "q8")])
def test_a_store_of_a_file_has_the_files_bits(
    checkpoint: Path, tmp_path: Path, kind: str, codec: str
) -> None:
    """And computes what the same numbers in float32 compute, but for the activations' rounding."""
    file = of_checkpoint(checkpoint, tmp_path / "m.gguf", matrices=kind)
    kept = convert(file, tmp_path / "kept", name="x")
    verify(kept.path)
    assert set(codecs(kept).values()) == {codec}
    assert kept.layout.layers[0].unit.width == 64
    wide = convert(file, tmp_path / "wide", name="x", dtype="float32")
    assert set(codecs(wide).values()) == {"float32"}
    for layer in range(3):
        for role in ("gate", "up", "down"):
            (one,), (other,) = kept.ffn(layer, role), wide.ffn(layer, role)
            rows, exact = one.widened(), other.widened()
            if role == "down":  # by output, in a unit of its own for each column of 64
                rows = rows.reshape(4, 64, 64).swapaxes(1, 2).reshape(256, 64)
            if kind in EXACT:
                assert np.array_equal(rows, exact)
            else:
                assert np.abs(rows - exact).max() < np.abs(exact).max() / 127
    if kind in EXACT:
        with LocalDecoder(kept) as ours, LocalDecoder(wide) as theirs:
            expected = theirs.prefill(PROMPT)
            assert expected.std() > 0.5
            assert np.abs(ours.prefill(PROMPT) - expected).max() < 1e-4  # widened, and no activation rounded
            assert np.abs(ours.steps(PROMPT) - expected).max() < 0.01


SHAPES: dict[str, dict[str, int]] = {
    "falcon-40b": {"hidden_size": 128, "num_attention_heads": 4},  # queries, keys and values are put in order
    "phi3": {"intermediate_size": 256},  # gate and up are halves of one tensor
    "gemma3": {"intermediate_size": 256, "head_dim": 32},
}


@pytest.mark.parametrize("variant", SHAPES)
def test_tensors_that_are_put_together_keep_their_bits(tmp_path: Path, variant: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", variant, changes=SHAPES[variant])
    extra = {"gemma3.attention.sliding_window_pattern": 2} if variant == "gemma3" else {}
    file = of_checkpoint(checkpoint, tmp_path / "m.gguf", extra, matrices="Q8_0")
    kept = convert(file, tmp_path / "kept", name="x")
    assert set(codecs(kept).values()) == {"q8"}
    wide = convert(file, tmp_path / "wide", name="x", dtype="float32")
    with LocalDecoder(kept) as ours, LocalDecoder(wide) as theirs:
        assert np.abs(ours.prefill(PROMPT) - theirs.prefill(PROMPT)).max() < 1e-4


def test_bits_below_the_files_are_rounded_and_bits_above_are_not(checkpoint: Path, tmp_path: Path) -> None:
    eight, four = (
        of_checkpoint(checkpoint, tmp_path / f"{kind}.gguf", matrices=kind) for kind in ("Q8_0", "Q4_1")
    )
    rounded = codecs(convert(eight, tmp_path / "eight", name="x", bits=4))
    assert {rounded[role] for role in ("gate", "up", "down")} == {"q4"}
    assert {rounded[name] for name in rounded if "weight" in name} == {"q8"}
    assert set(codecs(convert(four, tmp_path / "four", name="x", bits=8)).values()) == {"q4"}
    assert set(codecs(convert(four, tmp_path / "sixteen", name="x", bits=16)).values()) == {"float16"}


def test_a_sparse_files_down_rows_are_columns_and_rounded_again(tmp_path: Path) -> None:
    """A neuron that may be left out is a unit of its own, and groups along neurons cannot be."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama", changes={"intermediate_size": 256})
    file = of_checkpoint(checkpoint, tmp_path / "m.gguf", matrices="Q4_0")
    relu = GgufFile.open(file, keep=True)
    assert relu.entry("model.layers.0.mlp.down_proj.weight").dtype == "q4s"
    relu.config["hidden_act"] = "relu"  # which no GGUF architecture says yet
    conversion = check(relu, 512)
    unit = conversion.layout.layers[0].unit
    assert unit.width == 1
    assert {row.role: row.codec for row in unit.rows} == {"gate": "q4s", "up": "q4s", "down": "q8"}
    source = conversion.family.ffn(conversion.architecture, 0)["down"]
    rows = unit_rows("down", conversion.read(source), conversion.dtype(source), unit)
    exact = values(conversion.read(source), FORMATS["q4s"]).T
    assert rows.shape == (256, FORMATS["q8"].row_bytes(64))
    assert np.abs(values(rows, FORMATS["q8"]) - exact).max() < np.abs(exact).max() / 127
