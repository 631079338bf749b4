"""Synthetic checkpoints: what they hold, that transformers agrees, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import stores
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from tokenizers import Tokenizer

from pipeline.models.published import Shape
from storage.checkpoint import Checkpoint
from storage.codecs import narrow, widen
from storage.convert import convert
from storage.errors import CheckpointError, DiskFull, UnsupportedModel, UsageError
from storage.families.registry import family_of
from storage.gguf.file import GgufFile
from workers.lab.synthesis import __main__ as program
from workers.lab.synthesis import as_gguf
from workers.lab.synthesis import checkpoint as synthesis
from workers.lab.synthesis.activity import new_per_token, union_size
from workers.lab.synthesis.checkpoint import Request, synthesize
from workers.lab.synthesis.measure import measure, summary
from workers.lab.synthesis.planting import Planting
from workers.lab.synthesis.shapes import SHAPES, find_shape
from workers.lab.synthesis.sources import open_weights

LAYERS, VOCABULARY, TOKENS = 3, 512, 160
BUILTIN = Path(__file__).parent.parent / "storage" / "builtin"  # has a tokenizer


def tiny(name: str, **changes: object) -> Shape:
    """A published shape, narrow: d_model 256, d_ff 1,024."""
    shape = SHAPES[name]
    width = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    opt = {"word_embed_proj_dim": 256, "ffn_dim": 1024, "max_position_embeddings": 256}
    gated = {"num_key_value_heads": 4, "intermediate_size": 1024, "head_dim": 32}
    gated |= {"max_position_embeddings": 256}
    tokens = {"bos_token_id": 2, "eos_token_id": 2}
    extra = opt if shape.name.startswith("opt") else {} if shape.name.startswith("falcon") else gated
    return Shape(f"tiny-{name}", {**shape.config, **width, **extra, **tokens, **changes}, shape.dtype)


TINY = {
    "opt": tiny("opt-6.7b"),
    "falcon-7b": tiny("falcon-7b"),
    "falcon-rw": tiny("falcon-rw-1b"),
    "falcon-40b": tiny("falcon-40b", num_kv_heads=2),
    "llama-relu": tiny("llama-2-7b"),
    "minicpm-s": tiny("minicpm-s-1b"),
}


@pytest.fixture(scope="module", params=TINY)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / request.param
    synthesize(Request(TINY[request.param], layers=LAYERS), out)
    return out


@pytest.fixture
def text() -> list[int]:
    """Tokens as unevenly frequent as a text's, of another seed than the calibration's."""
    weights = 1 / (np.arange(VOCABULARY) + 2.7)
    random = np.random.default_rng(5)
    return random.choice(VOCABULARY, TOKENS, p=weights / weights.sum()).tolist()


def as_granite(made: Path, directory: Path) -> Path:
    """MiniCPM's checkpoint as a family that transformers knows, and that has the same multipliers."""
    config = json.loads((made / "config.json").read_text())
    said = {
        "model_type": "granite",
        "embedding_multiplier": config["scale_emb"],
        "attention_multiplier": config["head_dim"] ** -0.5,
        "residual_multiplier": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "logits_scaling": config["hidden_size"] / config["dim_model_base"],
        "hidden_act": "relu",
    }
    shutil.copytree(made, directory / "granite")
    (directory / "granite" / "config.json").write_text(json.dumps({**config, **said}))
    return directory / "granite"


def seen_by_transformers(
    made: Path, text: list[int], directory: Path
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each layer the active neurons [tokens, d_ff]; and the logits."""
    from transformers import AutoModelForCausalLM

    known, threshold = (as_granite(made, directory), 0.03) if made.name == "minicpm-s" else (made, 0.0)
    model = AutoModelForCausalLM.from_pretrained(
        known,
        dtype=torch.float32,
        attn_implementation="sdpa",  # its eager Falcon adds ALiBi twice
    ).eval()
    if threshold:
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Threshold(threshold, 0.0)
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("fc1", "dense_h_to_4h", "gate_proj")):
            module.register_forward_hook(lambda _, __, out: seen.append(out.reshape(TOKENS, -1) > threshold))
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0]
    assert logits.isfinite().all()
    return seen, logits


def test_transformers_finds_the_activity_that_is_measured(
    made: Path, text: list[int], tmp_path: Path
) -> None:

    seen, _ = seen_by_transformers(made, text, tmp_path)
    reports = measure(open_weights(made), text, rank=16)
    assert len(seen) == len(reports) == LAYERS
    for report, active in zip(reports, seen, strict=True):
        # A pre-activation at the threshold may fall on either side.
        assert report.active == pytest.approx(float(active[16:].float().mean()), rel=2e-3)
        assert report.new[4] == pytest.approx(new_per_token(active, 5), rel=5e-3)


def test_activity_is_the_plantings(made: Path, text: list[int]) -> None:
    means = summary(measure(open_weights(made), text, rank=16))
    assert 0.03 <= means["active"] <= 0.05
    ahead = means["lookahead"]
    assert ahead["0"]["recall"] == pytest.approx(0.95, abs=0.01)
    assert ahead["0"]["new"] < 0.6 * ahead["0"]["predicted"], "consecutive tokens share neurons"
    assert ahead["1"]["recall_same_threshold"] < 0.93, "looking ahead must not be trivially right"
    assert means["cosine"] < 0.97


def test_a_store_keeps_the_mark_and_the_activity(made: Path, text: list[int], tmp_path: Path) -> None:
    store = convert(made, tmp_path / "store", name="anything")
    assert store.manifest.parameters["synthetic"]["seed"] == 0
    weights = open_weights(store.path)
    assert weights.synthetic
    from_store, from_checkpoint = measure(weights, text, 16), measure(open_weights(made), text, 16)
    assert [report.active for report in from_store] == pytest.approx(
        [r.active for r in from_checkpoint], rel=1e-3
    )


def test_rates_change_how_many_neurons_are_new(text: list[int], tmp_path: Path) -> None:
    new = []
    for rate in (0.5, 1.0, 2.0):
        out = tmp_path / f"rate-{rate}"
        synthesize(Request(TINY["opt"], layers=2, rate=rate), out)
        new.append(summary(measure(open_weights(out), text, 16))["lookahead"]["0"]["new"])
    assert 1.4 * new[0] < new[1]
    assert 1.4 * new[1] < new[2]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(str(shard), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_a_seed_decides_every_byte_and_fewer_layers_are_the_first_ones(tmp_path: Path) -> None:
    for name, layers, seed in (("first", 2, 1), ("again", 2, 1), ("longer", 3, 1), ("other", 2, 2)):
        synthesize(Request(TINY["falcon-7b"], layers=layers, seed=seed), tmp_path / name)
    first, again, longer, other = (tensors(tmp_path / name) for name in ("first", "again", "longer", "other"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, longer[name]) for name, tensor in first.items())
    assert len(longer) > len(first)
    matrices = [name for name, tensor in first.items() if tensor.ndim == 2]
    assert matrices
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_a_shard_holds_one_layer_and_the_index_every_tensor(made: Path) -> None:
    index = json.loads((made / "model.safetensors.index.json").read_text())
    held = [shard.stat().st_size for shard in made.glob("*.safetensors")]
    assert len(held) == LAYERS + 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(made).values())
    assert index["weight_map"].keys() == tensors(made).keys()
    config = json.loads((made / "config.json").read_text())
    assert config["synthetic"]["shape"].startswith("tiny-")
    assert config["num_hidden_layers"] == LAYERS
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors(made).values()}
    assert dtypes == {config["torch_dtype"]}


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        synthesize(Request(TINY["opt"], layers=1), tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("told", [True, False])
def test_a_checkpoint_without_tokenizer_is_said_to_be_one_before_the_work(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()  # the work is refused
    given = [] if told else ["--tokenizer", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", ["synthesize", "--shape", "opt-125m", "--out", str(tmp_path / "out"), *given]
    )
    assert program.run() == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert ("run.py can give it no text" in first) is told


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen3-1.7b"])
def test_a_dense_gated_model_is_what_transformers_reads(name: str, text: list[int], tmp_path: Path) -> None:
    tied = find_shape(name).config["tie_word_embeddings"]
    synthesize(Request(tiny(name), layers=LAYERS), tmp_path / "dense")
    assert ("lm_head.weight" in tensors(tmp_path / "dense")) is not tied
    seen, logits = seen_by_transformers(tmp_path / "dense", text, tmp_path)
    reports = measure(open_weights(tmp_path / "dense"), text, rank=16)
    assert [report.active for report in reports] == pytest.approx(
        [float(active[16:].float().mean()) for active in seen], rel=2e-3
    )
    assert all(0.4 < report.active < 0.6 for report in reports), "nothing is planted"
    assert 0.4 < float(logits.std()) < 4


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-1.7b", "falcon-7b"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_gguf_file_holds_the_same_weights(name: str, kind: str, tmp_path: Path) -> None:
    # More rows than the tokenizer has tokens, and a number that float32 holds.
    falcon = name == "falcon-7b"
    shape = tiny(name, vocab_size=4160, **{"layer_norm_epsilon" if falcon else "rms_norm_eps": 2**-20})
    request = Request(shape, layers=2, tokenizer=BUILTIN, activation="gelu" if falcon else None)
    synthesize(request, tmp_path / "model")
    as_gguf.write(tmp_path / "model", tmp_path / "model.gguf", kind)
    ours, theirs = Checkpoint.open(tmp_path / "model"), GgufFile.open(tmp_path / "model.gguf")
    assert theirs.entries.keys() == ours.entries.keys()
    for key, entry in ours.entries.items():
        values, read = (widen(one.read(key), one.entries[key].dtype) for one in (ours, theirs))
        if entry.shape[1:] and kind != "F32":
            form = GGMLQuantizationType[kind]
            exact = gguf.dequantize(gguf.quantize(values, form), form).reshape(values.shape)
            values = widen(narrow(exact, "float16"), "float16")
        assert np.array_equal(values, read), key
    made, again = (family_of(one.config).architecture(one.config) for one in (ours, theirs))
    assert replace(again, max_positions=made.max_positions) == made
    tokenizer = Tokenizer.from_str(theirs.texts()["tokenizer.json"].decode())
    known = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    sentence = "Once upon a time, there was 1 dragon!"
    assert tokenizer.encode(sentence).ids == known.encode(sentence).ids
    assert tokenizer.get_vocab_size() == 4160


def test_what_cannot_be_gguf_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="relu; only llama with silu, qwen3"):
        as_gguf.write(made, tmp_path / "x.gguf", "Q8_0")
    with pytest.raises(UsageError, match="one of F32, F16"):
        as_gguf.write(made, tmp_path / "x.gguf", "Q4_K")
    with pytest.raises(UsageError, match="exists"):
        as_gguf.write(made, made, "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_gelu_has_no_thresholds(text: list[int], tmp_path: Path) -> None:
    synthesize(Request(TINY["falcon-7b"], layers=1, activation="gelu"), tmp_path / "gelu")
    (report,) = measure(open_weights(tmp_path / "gelu"), text, 16)
    assert 0.4 < report.active < 0.6


def test_unknown_shapes_name_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean.*opt-6\.7b"):
        find_shape("facebook/opt-6.7")
    with pytest.raises(UsageError, match="known are opt-125m"):
        find_shape("zebra")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 9}, "choose 1 to 4"),
        ({"rate": 3.0}, "rate must be"),
        ({"activation": "silu"}, "must be relu or gelu"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        synthesize(Request(TINY["opt"], **changes), tmp_path / "out")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 30))
    with pytest.raises(DiskFull, match=r"needs 13\.3 GB and .* has 1\.1 GB free"):
        synthesize(Request(SHAPES["opt-6.7b"]), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthesis, "save_file", full)
    with pytest.raises(DiskFull, match="has been removed"):
        synthesize(Request(TINY["opt"], layers=1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UsageError, match="exists"):
        synthesize(Request(TINY["opt"], layers=1), tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        synthesize(Request(TINY["opt"], layers=1, tokenizer=tmp_path / "there"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_published_sizes() -> None:
    """Bytes of the whole checkpoints: docs of the published ones say 13.32 and 14.4 GB."""
    sizes = {}
    for name in ("opt-6.7b", "falcon-7b"):
        config, model, family = synthesis.plan(Request(SHAPES[name]))
        sizes[name] = synthesis.tensor_bytes(family, config, model, SHAPES[name].dtype)
    assert sizes["opt-6.7b"] == pytest.approx(13.32e9, rel=0.002)
    assert sizes["falcon-7b"] == pytest.approx(13.84e9, rel=0.002)


def test_windows_count_what_they_say() -> None:
    active = torch.zeros(40, 4, dtype=torch.bool)
    active[:, 0] = True  # never new
    active[::2, 1] = True  # new for a window of 1, in every second token
    assert new_per_token(active, 1) == pytest.approx(0.5 / 4)
    assert new_per_token(active, 2) == 0
    assert union_size(active, 1) == pytest.approx(1.5 / 4)
    assert union_size(active, 2) == pytest.approx(2 / 4)


def test_presets_stay_in_the_papers_range() -> None:
    preset = Planting.at_rate(1, stores.architecture(layers=1, d_ff=8, d_model=4))
    assert 0.03 <= preset.active <= 0.05
    assert 0.02 <= preset.new <= 0.035
