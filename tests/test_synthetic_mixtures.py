"""Synthetic mixtures: their store, the GGUF file of the same weights, and what routing comes out of them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import reference_model, write_checkpoint
from decoding import LocalDecoder

from pipeline.launch import module_command, module_environment
from pipeline.models.published import Shape
from storage.codecs import CODECS
from storage.convert import convert
from storage.errors import UsageError
from storage.manifest import BUNDLES, RESIDENT
from storage.store import Store
from storage.tensors import Tensors
from workers.lab.synthesis import block
from workers.lab.synthesis.mixture import as_gguf, draw, routing
from workers.lab.synthesis.mixture.create import MixtureRequest, create, create_checkpoint
from workers.lab.synthesis.mixture.dense import DenseMixture, routed
from workers.lab.synthesis.mixture.planting import MixturePlanting
from workers.lab.synthesis.mixture.routing_table import print_table
from workers.lab.synthesis.shapes import MIXTURES, SHAPES
from workers.lab.synthesis.sources import StoreWeights

BUILTIN = Path(__file__).parent.parent / "storage" / "builtin"  # has a tokenizer
VOCABULARY, LAYERS, TOKENS = 512, 3, 200
NARROW = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    "qwen3-30b-a3b": {"moe_intermediate_size": 128, "num_experts": 64},
    "olmoe": {"intermediate_size": 128, "num_key_value_heads": 8},
    "mixtral-8x7b": {"intermediate_size": 128},
    "gpt-oss-20b": {"intermediate_size": 128, "sliding_window": 32},
}


def small(name: str) -> Shape:
    shape = SHAPES[name]
    return Shape(f"small-{name}", {**shape.config, **NARROW, **SMALL[name]}, shape.dtype)


@pytest.fixture(scope="module", params=MIXTURES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("synthetic") / request.param
    return create(MixtureRequest(small(request.param), layers=LAYERS), out)


@pytest.fixture
def text() -> list[int]:
    """Tokens as unevenly frequent as a text's, of another seed than the calibration's."""
    weights = 1 / (np.arange(VOCABULARY) + 2.7)
    random = np.random.default_rng(5)
    return random.choice(VOCABULARY, TOKENS, p=weights / weights.sum()).tolist()


def test_drawn_codes_have_the_deviation_that_was_asked_for() -> None:
    for codec in ("q4s", "q8", "mxfp4"):
        rows = draw.matrix(draw.source(1, codec), 64, 512, codec, np.array([[0.5]] * 32 + [[2.0]] * 32))
        values = CODECS[codec].widen(rows)
        assert values[:32].std() == pytest.approx(0.5, rel=0.03)
        assert values[32:].std() == pytest.approx(2.0, rel=0.03)
        assert abs(values[32:].mean()) < 0.05
        assert np.array_equal(values.astype(np.float16), values), "float16 holds them"
        if codec == "mxfp4":
            continue
        draw.put(rows, codec, 64, np.tile(np.linspace(-7, 7, 64, dtype=np.float32), (64, 1)))
        again = CODECS[codec].widen(rows)
        assert np.array_equal(again[:, :64], values[:, :64])
        assert np.array_equal(again[:, 128:], values[:, 128:])
        assert np.abs(again[:, 64:128] - np.linspace(-7, 7, 64)).max() < (0.51 if codec == "q4s" else 0.05)
        assert np.array_equal(again.astype(np.float16), again)


def test_the_measures_reference_computes_what_the_worker_computes(store: Store, text: list[int]) -> None:
    """Logits of a prompt by either, and no expert's bytes are another's."""
    found, model, ids = DenseMixture.of(store), store.architecture, text[:24]
    x = found.embedded(ids)
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            tensors = found.layer(index)
            attended = block.attention(layer, tensors, block.attention_input(layer, tensors, x))
            f = block.ffn_input(layer, tensors, x, attended)
            out = found.ffn(index, tensors, f, routed(layer.ffn, tensors, f))
            x = block.block_output(layer, tensors, x, attended, out)
        assert model.final_norm is not None
        final = torch.nn.functional.rms_norm(
            x, x.shape[-1:], found.tensor("final_norm.weight"), model.final_norm.epsilon
        )
        logits = (final @ found.tensor("head.weight").T).numpy()
    with LocalDecoder(store) as decoder:
        expected = decoder.prefill(ids)[-1]
    assert np.abs(logits[-1] - expected).max() < 1e-3 * np.abs(expected).max()
    assert 0.5 < float(expected.std()) < 5
    units = np.concatenate([store.read_layer(index) for index in range(LAYERS)])
    assert len({unit.tobytes() for unit in units}) == len(units)


def test_the_gguf_file_has_the_same_codes(store: Store, tmp_path: Path) -> None:
    """Widened by the package `gguf` to the store's values, and converted back to the store's bytes."""
    path = tmp_path / "model.gguf"
    as_gguf.write(store, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    unit, units = store.layout.layers[1].unit, store.read_layer(1)
    for role in ("gate", "up", "down"):
        tensor = tensors[f"blk.1.ffn_{role}_exps.weight"]
        assert tensor.tensor_type.name == ("MXFP4" if unit.codec(role).name == "mxfp4" else "Q4_0")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.reshape(-1, values.shape[-1]), unit.view(units, role).widened())
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type.name == "Q8_0"
    values = gguf.dequantize(embedding.data, embedding.tensor_type)
    assert np.array_equal(values, DenseMixture.of(store).tensor("embed.weight").numpy())
    back = convert(path, tmp_path / "back", name="back")
    assert back.manifest.files[BUNDLES] == store.manifest.files[BUNDLES]
    ours, theirs = Tensors(store.path / RESIDENT), Tensors(back.path / RESIDENT)
    assert sorted(ours.names) == sorted(theirs.names)
    for name in ours.names:
        assert np.array_equal(ours.read(name), theirs.read(name)), name
    for one, other in zip(back.architecture.layers, store.architecture.layers, strict=True):
        assert one.ffn == other.ffn
        assert replace(one.attention, qk_norm=None) == replace(other.attention, qk_norm=None)


def published(checkpoint: Path, packed: bool) -> Any:
    """As transformers reads it; MXFP4 widened."""
    if not packed:
        return reference_model(checkpoint)
    from transformers import AutoModelForCausalLM, Mxfp4Config

    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=config, attn_implementation="eager"
    )
    return model.float().eval()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_checkpoint_of_the_same_numbers(name: str, tmp_path: Path, text: list[int]) -> None:
    """transformers reads it, and what is converted from it holds the values of the store drawn directly."""
    request = MixtureRequest(small(name), layers=2)
    drawn, checkpoint = create(request, tmp_path / "drawn"), tmp_path / "checkpoint"
    create_checkpoint(request, checkpoint)
    store = convert(checkpoint, tmp_path / "store", name="x")
    packed = name == "gpt-oss-20b"
    assert {row.codec for row in store.layout.unit.rows} == {"mxfp4" if packed else "float16"}
    assert (store.manifest.files[BUNDLES] == drawn.manifest.files[BUNDLES]) == packed
    ours, theirs = DenseMixture.of(store), DenseMixture.of(drawn)
    assert sorted(ours.resident.names) == sorted(theirs.resident.names)
    for tensor in ours.resident.names:
        assert torch.equal(ours.tensor(tensor), theirs.tensor(tensor)), tensor
    for layer in range(2):
        for expert in range(store.layout.layers[layer].units):
            found = theirs.expert(layer, expert)
            for role, values in ours.expert(layer, expert).items():
                assert np.array_equal(values, found[role])
    ids = text[:24]
    with torch.no_grad():
        expected = published(checkpoint, packed)(torch.tensor([ids])).logits[0].numpy()
    with LocalDecoder(store) as decoder:
        assert np.abs(decoder.prefill(ids) - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(UsageError, match="exists: choose another directory"):
        create_checkpoint(request, checkpoint)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_converted_mixture_becomes_a_gguf_file_of_the_same_values(bits: int | None, tmp_path: Path) -> None:
    """In 16 bits, and in four with minima. On the way back float32 rows become float16, but for routers."""
    changes = {"hidden_size": 64, "moe_intermediate_size": 64}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "qwen3-moe", "bfloat16", changes=changes)
    (checkpoint / "tokenizer.json").unlink()  # of words, which GGUF has no form for
    store = convert(checkpoint, tmp_path / "store", name="mixture", bits=bits)
    as_gguf.write(store, tmp_path / "model.gguf")
    back = convert(tmp_path / "model.gguf", tmp_path / "back", name="back")
    if bits is not None:
        assert store.layout.layers[0].unit.codec("gate").name == "q4"
        assert back.manifest.files[BUNDLES] == store.manifest.files[BUNDLES]
    ids = [9, 77, 31, 5, 40]
    with LocalDecoder(store) as ours, LocalDecoder(back) as theirs:
        expected, found = ours.prefill(ids), theirs.prefill(ids)
    assert expected.std() > 0
    assert np.array_equal(found, expected) if bits else np.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_equal_seeds_give_equal_stores_and_fewer_layers_their_beginning(tmp_path: Path) -> None:
    request = MixtureRequest(small("qwen3-30b-a3b"), layers=2)
    whole, again = create(request, tmp_path / "a"), create(request, tmp_path / "b")
    assert whole.manifest.files == again.manifest.files
    one = create(replace(request, layers=1), tmp_path / "c")
    size = one.layout.total_bytes
    assert (one.path / BUNDLES).read_bytes() == (whole.path / BUNDLES).read_bytes()[:size]
    other = create(replace(request, seed=1, bits=8), tmp_path / "d")
    assert {row.codec for row in other.layout.layers[0].unit.rows} == {"q8"}
    with pytest.raises(UsageError, match="bits must be 4 or 8, not 3"):
        create(replace(request, bits=3), tmp_path / "e")


def test_routing_is_local_and_foreseen_as_published(tmp_path: Path, text: list[int]) -> None:
    request = MixtureRequest(small("qwen3-30b-a3b"), layers=4)
    reports = routing.measure(create(request, tmp_path / "a"), text)
    first, others = reports[0], reports[1:]
    found = routing.summary(others)
    # 8 of 64 here: chance is twice the published shape's.
    assert 0.35 < found["reuse_1"] < 0.6
    assert first.reuse[1] < found["reuse_1"] - 0.1
    assert found["reuse_8"] < found["reuse_1"]
    assert first.hottest < found["hottest"]
    assert all(one.reuse[1] > one.chance + 0.05 for one in others)
    assert 0.75 < reports[2].recall[1] < 0.95
    assert reports[3].recall[2] < reports[3].recall[1]
    assert reports[1].recall[1] < 0.7  # the second layer's attention brings what the first cannot know
    fewer, more, none = (
        routing.summary(routing.measure(create(one, tmp_path / name), text)[1:])
        for name, one in (
            ("fewer", replace(request, rate=0.5)),
            ("more", replace(request, rate=2.0)),
            ("none", replace(request, locality=False)),
        )
    )
    assert fewer["new"] < found["new"] < more["new"] < none["new"]
    assert none["reuse_1"] == pytest.approx(none["chance"], abs=0.05)
    assert none["reuse_1"] < 0.2 < more["reuse_1"] < found["reuse_1"] < fewer["reuse_1"]


def test_chance_by_hand() -> None:
    """Evenly used experts are a token's as often as it has some; and expert 0 is in every token here."""
    assert routing.chance(np.full(8, 3), tokens=12) == pytest.approx(2 / 8)
    assert routing.chance(np.array([10, 5, 5, 0]), tokens=10) == pytest.approx((1 + 0.25 + 0.25) / 2)


def test_the_report_says_that_it_is_synthetic(
    store: Store, text: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = routing.measure(store, text[:40], layers=1)
    assert len(reports) == 1
    print_table(StoreWeights(store), 40, reports)
    assert "SYNTHETIC" in capsys.readouterr().out


def test_a_rate_that_has_no_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="not 3"):
        MixturePlanting.at_rate(3.0)


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("flags", [[], ["--direct"]])
def test_llama_cpp_reads_a_mixtures_text_token_by_token(
    tmp_path: Path, text: list[int], flags: list[str]
) -> None:
    shape = small("qwen3-30b-a3b")
    shape = replace(shape, config={**shape.config, "vocab_size": 4096})
    store = create(MixtureRequest(shape, layers=1, tokenizer=BUILTIN), tmp_path / "store")
    as_gguf.write(store, tmp_path / "model.gguf")
    tokens = tmp_path / "tokens"
    tokens.write_text(" ".join(map(str, text[:14])))
    line = module_command("workers.lab.peers.run_llama_cpp", str(tmp_path / "model.gguf"), "--forced", *flags)
    line += ["--tokens", str(tokens), "--prompt-tokens", "9", "--threads", "1", "--scratch", str(tmp_path)]
    done = subprocess.run(
        [*line, "--limit", str(1 << 30)],
        env=module_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["prompt_tokens"] == 9
    assert len(result["token_seconds"]) == 5
