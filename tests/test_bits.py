"""Stores in eight and four bits: which tensor has which codec, what computes with them, what is refused."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import predictors
import pytest
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from ring import PROMPT as RING_PROMPT
from ring import config, outcome
from safetensors.torch import load_file
from test_convert import child, contents
from test_manifest import changed, refused

from pipeline import cli
from pipeline.config import Config
from pipeline.models.names import configure, find_source
from pipeline.ring.plan import Forecast
from storage.architecture import Ffn
from storage.codecs import CODECS
from storage.convert import convert
from storage.convert.recipe import Recipe, chosen, unit_width
from storage.errors import ConfigError, StoreError, StoreIncomplete, UsageError
from storage.manifest import RESIDENT
from storage.predictors import SUM, check_sum, copy_all
from storage.repair import repair
from storage.store import Store
from storage.tensors import Tensors
from storage.verify import verify
from workers import kernels
from workers.compute.sampling import log_probability
from workers.compute.torch.device import TorchDevice
from workers.compute.weights import Weights
from workers.lab.bench.naive import NaiveModel
from workers.lab.evaluation.activations import compare
from workers.predictor.lowrank import load

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(20))]
NEURONS = 256  # of a layer; of a dense model's 64 are a unit
Here = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `here`


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense gated one, and a sparse one."""
    base = tmp_path_factory.mktemp("bits")
    return {
        "llama": write_checkpoint(base / "llama", "llama", "float16", changes={"intermediate_size": NEURONS}),
        "opt": write_checkpoint(base / "opt", "opt", "float16", changes={"ffn_dim": NEURONS}),
    }


@pytest.fixture(scope="module")
def stores(checkpoints: dict[str, Path]) -> dict[tuple[str, int], Store]:
    """Of both in eight and in four bits."""
    return {
        (name, bits): convert(path, path.with_name(f"{name}-{bits}"), name=name, bits=bits)
        for name, path in checkpoints.items()
        for bits in (8, 4)
    }


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize(("bits", "codec"), [(8, "q8"), (4, "q4")])
def test_every_tensor_has_its_codec(
    stores: dict[tuple[str, int], Store], name: str, bits: int, codec: str
) -> None:
    """The FFN has the bits that are asked for, attention, embedding and head have eight, vectors 16."""
    store = stores[name, bits]
    verify(store.path)
    for layer in store.layout.layers:
        assert {row.codec for row in layer.unit.rows} == {codec}
        assert layer.unit.width == (64 if name == "llama" else 1)
        assert layer.units * layer.unit.width == NEURONS
    eight, sixteen = set(), set()
    for tensor, place in Tensors(store.path / RESIDENT).places.items():
        assert place.dtype in ("q8", "float16")
        (eight if place.dtype == "q8" else sixteen).add(tensor.rsplit(".", 2)[-2])
    if name == "llama":
        assert (eight, sixteen) == ({"embed", "head", "qkv", "out"}, {"norm", "ffn_norm", "final_norm"})
    else:
        assert eight == {"embed", "qkv", "out"}
        assert sixteen >= {"positions", "norm", "qkv", "up", "down"}  # of the latter the biases
    assert store.manifest.parameters["bits"] == bits


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_the_checkpoints_rounded_once(
    checkpoints: dict[str, Path], stores: dict[tuple[str, int], Store], bits: int
) -> None:
    """A dense model's down rows lie by output, as the checkpoint has them; a sparse one's are columns."""
    names = {
        "llama": (
            "model.layers.1.mlp.gate_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
        ),
        "opt": ("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
    }
    for model, found in names.items():
        source = load_file(checkpoints[model] / "model.safetensors")
        store = stores[model, bits]
        roles = [row.role for row in store.layout.layers[1].unit.rows]
        for role, name in zip(roles, found, strict=True):
            matrix = source[f"{name}.weight"].float().numpy()
            if role == "down" and model == "llama":
                matrix = np.concatenate([matrix[:, start : start + 64] for start in range(0, NEURONS, 64)])
            elif role == "down":
                matrix = np.ascontiguousarray(matrix.T)
            (rows,) = store.ffn(1, role)
            stored = np.ascontiguousarray(rows.values).reshape(-1, rows.elements)
            assert stored.tobytes() == rows.codec.narrow(matrix).tobytes()
        name = "model.embed_tokens" if model == "llama" else "model.decoder.embed_tokens"
        embedding = CODECS["q8"].narrow(source[f"{name}.weight"].float().numpy())
        assert Tensors(store.path / RESIDENT).read("embed.weight").tobytes() == embedding.tobytes()


@pytest.mark.parametrize(
    ("neurons", "width"),
    [
        (14336, 256),
        (11008, 256),
        (4864, 256),
        (1536, 256),
        (256, 64),
        (512, 128),
        (96, 1),
        (11000, 1),
        (64, 1),
    ],
)
def test_a_dense_layer_has_units_of_whole_groups_and_at_least_four(neurons: int, width: int) -> None:
    assert unit_width(Ffn("gated", neurons, 1, "silu"), low=True) == width
    assert unit_width(Ffn("gated", neurons, 1, "relu"), low=True) == 1
    assert unit_width(Ffn("gated", neurons, 1, "silu"), low=False) == 1


@pytest.mark.ring
def test_a_small_store_has_four_bits_in_attention_too(checkpoints: dict[str, Path], here: Here) -> None:
    """Made by the command; its text does not hang on its slots, and a file that it lost comes back."""
    path, large = checkpoints["llama"], checkpoints["llama"].with_name("llama-4")
    out = path.with_name("small")
    done = here(cli.main, "convert", path, out, "--bits", "4", "--small")
    assert done.returncode == 0, done.stderr
    store, resident = Store.open(out), Tensors(out / RESIDENT)
    assert {row.codec for row in store.layout.unit.rows} == {"q4s"}
    assert {resident.dtype(f"layers.0.{part}.weight") for part in ("qkv", "out")} == {"q4s"}
    assert {resident.dtype(name) for name in ("embed.weight", "head.weight")} == {"q8"}
    usual = convert(path, large, name="llama", bits=4)
    sizes = [sum(entry.bytes for entry in one.manifest.files.values()) for one in (store, usual)]
    assert sizes[0] < sizes[1]
    every = config(predictor={"kind": "all"})
    assert outcome(store, every, slots=1, staging=2) == outcome(store, every, slots=4)
    before = (out / RESIDENT).read_bytes()
    (out / RESIDENT).write_bytes(before[:-1] + b"x")
    repair(out, path)
    assert (out / RESIDENT).read_bytes() == before
    with pytest.raises(UsageError, match="--small is for --bits 4"):
        convert(path, path.with_name("other"), name="x", bits=8, small=True)


def test_a_recipe_never_adds_bits() -> None:
    assert Recipe.of(8) == Recipe(8, "q8", "q8")
    assert Recipe.of(4) == Recipe(4, "q4", "q8")
    assert Recipe.of(16).ffn is Recipe.of(None).ffn is None
    found = [chosen(source, "q8", 128) for source in ("float32", "bfloat16", "q8", "q4", "q4s")]
    assert found == ["q8", "q8", "q8", "q4", "q4s"]
    assert chosen("float16", "q4", 96) == "float16"  # no whole pairs of runs
    assert chosen("float16", None, 128) == "float16"
    for bits in (0, 5, 32):
        with pytest.raises(UsageError, match=f"bits must be 16, 8 or 4, not {bits}"):
            Recipe.of(bits)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("bits", [8, 4])
def test_devices_prompts_and_tokens_agree(stores: dict[tuple[str, int], Store], name: str, bits: int) -> None:
    """Torch and a prompt's blocks compute with widened rows; one token's kernels round its vectors."""
    store = stores[name, bits]
    with (
        LocalDecoder(store) as cpu,
        LocalDecoder(store, device=TorchDevice(Weights(store), 128)) as torch,
    ):
        expected = cpu.prefill(PROMPT)
        assert expected.std() > 0.5
        assert np.abs(torch.prefill(PROMPT) - expected).max() < 1e-4
        one_by_one = cpu.steps(PROMPT)
        assert np.abs(torch.steps(PROMPT) - expected).max() < 1e-4
    assert 0 < np.abs(one_by_one - expected).max() < 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_is_streamed_whole_computes_the_same(
    stores: dict[tuple[str, int], Store], bits: int
) -> None:
    store = stores["llama", bits]
    with NaiveModel(store, 32, 1) as naive, LocalDecoder(store) as decoder:
        streamed = np.stack([naive.forward(token, place) for place, token in enumerate(PROMPT[:4])])
        assert streamed.tobytes() == decoder.steps(PROMPT[:4]).tobytes()


def test_more_bits_are_nearer(checkpoints: dict[str, Path], stores: dict[tuple[str, int], Store]) -> None:
    """To the logits of the weights as they were."""
    for name, path in checkpoints.items():
        with LocalDecoder(convert(path, path.with_name(f"{name}-own"), name=name)) as decoder:
            expected = decoder.prefill(PROMPT)
        off = {}
        for bits in (8, 4):
            with LocalDecoder(stores[name, bits]) as decoder:
                off[bits] = np.sqrt(np.square(decoder.prefill(PROMPT) - expected).mean()) / expected.std()
        assert off[8] < 0.05
        assert 2 * off[8] < off[4] < 0.5


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_killed_conversion_resumes_in_its_bits(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model, out = checkpoints[name], tmp_path / "store"
    for operation in (6, 9, 12):
        assert child(model, out, operation, 0, 4).returncode == -signal.SIGKILL
    assert 0 < json.loads((tmp_path / "store.partial" / "progress.json").read_text())["layers"] < 3
    for bits in (None, 8):
        with pytest.raises(StoreIncomplete, match="with other parameters"):
            convert(model, out, name="child", bits=bits)
    assert child(model, out, 0, 0, 4).returncode == 0
    expected = convert(model, tmp_path / "whole", name="child", bits=4)
    assert contents(out) == contents(expected.path)
    with pytest.raises(UsageError, match="other conversion parameters"):
        convert(model, out, name="child", bits=8)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("layout/0/rows/up", "q5", "rows of q5"),
        ("layout/0/rows/up", ["q4"], "unhashable"),
        ("layout/0/rows/up", "q4g128", "rows of q4g128"),  # rows of 64 values
        ("layout/0/rows/down", "q8g128", "rows of q8g128"),  # by output: as wide as the unit
        ("layout/0/rows/up", "q8", "where their rows take"),
        ("layout/0/width", 32, "rows of q4"),
        ("layout/0/d_model", 96, "rows of q4"),
        ("architecture/layers/0/ffn/activation", "relu", "units that this flashring does not read"),
        ("architecture/layers/0/ffn/width", 32, "not its architecture's"),
    ],
)
def test_a_manifest_that_makes_no_sense(
    stores: dict[tuple[str, int], Store], tmp_path: Path, path: str, value: Any, words: str
) -> None:
    store = stores["llama", 4]
    (tmp_path / "store").mkdir()
    assert words in refused(tmp_path / "store", json.dumps(changed(store.manifest.to_json(), path, value)))


@pytest.mark.parametrize(
    "codecs",
    [
        "{",
        "[]",
        "7",
        "[" * 100_000,
        '{"nowhere": "q8"}',
        '{"embed.weight": "q5"}',
        '{"embed.weight": ["q8"]}',
        '{"embed.weight": null}',
        '{"embed.weight": "float32"}',
        '{"embed.weight": "q8g128"}',
        '{"final_norm.weight": "q8"}',
        '{"scalar": "q8"}',
    ],
)
def test_damaged_codecs_of_resident_tensors(
    stores: dict[tuple[str, int], Store], tmp_path: Path, codecs: str
) -> None:
    path = with_codecs(stores["llama", 8].path / RESIDENT, tmp_path / RESIDENT, codecs)
    with pytest.raises(StoreError, match=r"resident\.safetensors is damaged: its codecs cannot be read"):
        Tensors(path)


def test_bytes_without_a_codec(stores: dict[tuple[str, int], Store], tmp_path: Path) -> None:
    path = with_codecs(stores["llama", 8].path / RESIDENT, tmp_path / RESIDENT, "{}")
    with pytest.raises(StoreError, match=r"holds embed\.weight as U8, which is not supported"):
        Tensors(path).read("embed.weight")


def with_codecs(source: Path, path: Path, codecs: str) -> Path:
    """A copy that has a scalar more, and this text for its codecs."""
    data = source.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["codecs"])["embed.weight"] == "q8"
    header["__metadata__"]["codecs"] = codecs
    header["scalar"] = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def test_a_cached_store_for_each_number_of_bits(checkpoints: dict[str, Path]) -> None:
    model = str(checkpoints["opt"])
    found = {
        bits: configure(model, None, [], {"model": {"bits": bits}})[0].cached_store()
        for bits in (None, 16, 8, 4)
    }
    assert found[16] == found[None]  # the checkpoint has 16
    assert len(set(found.values())) == 3
    assert configure(model, None, ["model.bits=8"])[0].cached_store() == found[8]
    assert find_source(model).cached_store() == found[None]


def test_a_cached_gguf_store_in_its_own_bits_is_not_the_widened_one(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    found = {
        bits: configure(str(tmp_path / "m.gguf"), None, [], {"model": {"bits": bits}})[0].cached_store()
        for bits in (None, 16, 8, 4)
    }
    assert len(set(found.values())) == 4


@pytest.mark.parametrize("bits", ["5", "0", "-4", "four"])
def test_a_number_of_bits_that_is_not_offered(
    checkpoints: dict[str, Path], tmp_path: Path, here: Here, bits: str
) -> None:
    """By every command in one sentence, before anything is converted."""
    model = checkpoints["opt"]
    for arguments in (
        ("--prompt", "x", "--model", model),
        ("chat", "--model", model),
        ("convert", model, tmp_path / "out"),
    ):
        done = here(cli.main, *arguments, "--bits", bits)
        assert done.returncode == 2
        assert done.stdout == ""
        (sentence,) = done.stderr.splitlines()
        assert "bits" in sentence
        assert "Traceback" not in sentence
    assert not (tmp_path / "out").exists()


def test_the_bits_of_a_store_cannot_be_chosen(stores: dict[tuple[str, int], Store], here: Here) -> None:
    store = stores["llama", 8].path
    done = here(cli.main, "--prompt", "x", "--model", store, "--bits", "8")
    assert done.returncode == UsageError.exit_code == 2
    expected = f"flashring: {store} is a store already: its bits were chosen when it was converted"
    assert done.stderr.splitlines() == [expected]


def test_the_configuration_offers_three_numbers() -> None:
    assert Config.parse({"model": {"bits": 4}}).model.bits == 4
    with pytest.raises(ConfigError, match="bits"):
        Config.parse({"model": {"bits": 5}})


@pytest.mark.ring
@pytest.mark.parametrize("bits", [8, 4])
def test_a_ring_does_not_depend_on_its_slots(stores: dict[tuple[str, int], Store], bits: int) -> None:
    """All units of a layer in memory, or one of four, and two of them on their way."""
    every = config(predictor={"kind": "all"})
    threads = config(predictor={"kind": "all"}, compute={"threads": 2, "context": 128})
    store = stores["llama", bits]
    everything = outcome(store, every, slots=4)
    assert outcome(store, threads, slots=1, staging=2) == everything


@pytest.mark.ring
@pytest.mark.parametrize("bits", [8, 4])
def test_a_ring_multiplies_activations_as_they_are(
    stores: dict[tuple[str, int], Store], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probabilities are those of the same kernels without a ring, which rounding would change."""
    store = stores["llama", bits]
    found = {
        activations: outcome(
            store, config(predictor={"kind": "all"}, compute={"threads": 1, "activations": activations})
        )
        for activations in ("exact", "rounded")
    }
    tokens = found["exact"].tokens
    monkeypatch.setattr(kernels.ACTIVATIONS, "exact", True)
    with LocalDecoder(store) as decoder:
        decoder.prefill(RING_PROMPT)
        alone = [log_probability(decoder.step(token), then) for token, then in pairwise(tokens)]
    assert found["exact"].logprobs[1:] == alone
    assert found["rounded"].logprobs[1:] != alone


@pytest.mark.parametrize("bits", [8, 4])
def test_what_rounded_activations_cost(stores: dict[tuple[str, int], Store], bits: int) -> None:
    """Beside the divergence of the same logits, made by decoders of either kind."""
    store, logs = stores["llama", bits], {}
    cost = compare(store, [PROMPT], 1, bits)
    for exact in (True, False):
        kernels.ACTIVATIONS.exact = exact
        with LocalDecoder(store) as decoder:
            logits = decoder.steps(PROMPT[:-1]).astype(np.float64)
        logs[exact] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    divergence = (np.exp(logs[True]) * (logs[True] - logs[False])).sum(1)
    assert cost.tokens == len(PROMPT) - 1
    assert 0 < cost.divergence_mean == pytest.approx(divergence.mean(), rel=1e-6)
    assert cost.divergence_largest == pytest.approx(divergence.max(), rel=1e-6)
    nats = -logs[True][np.arange(len(PROMPT) - 1), PROMPT[1:]].mean()
    assert cost.perplexity_exact == pytest.approx(np.exp(nats), rel=1e-6)
    assert cost.perplexity_rounded != cost.perplexity_exact
    assert not kernels.ACTIVATIONS.exact


# -- predictors of the weights as they were ---------------------------------------------------------


def test_a_store_takes_the_predictors_of_another_of_its_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path, here: Here
) -> None:
    whole = convert(checkpoints["opt"], tmp_path / "whole", name="opt")
    layers = range(len(whole.layout.layers))
    for name in ("default", "early"):
        predictors.write(whole, predictors.maps(whole, "layers", layers), name)
    out = tmp_path / "eight"
    options = ("--bits", "8", "--predictors-of", str(whole.path))
    assert here(cli.main, "convert", str(checkpoints["opt"]), str(out), *options).returncode == 0
    store = Store.open(out)
    for name in ("default", "early"):
        taken, given = Tensors(store.predictors(name)), Tensors(whole.predictors(name))
        assert taken.metadata == {**given.metadata, "store": store.identity, SUM: taken.metadata[SUM]}
        check_sum(taken)
        for tensor in given.names:
            assert (taken.read(tensor) == given.read(tensor)).all()
    forecast = Forecast("lowrank", 1, refine=False)
    mask = load(store, "default", forecast, 0.0).active(
        1, np.ones(store.architecture.d_model, np.float32), False
    )
    assert mask.shape == (NEURONS,)


def test_predictors_of_another_checkpoint_are_refused(
    checkpoints: dict[str, Path], stores: dict[tuple[str, int], Store], tmp_path: Path
) -> None:
    other = convert(write_checkpoint(tmp_path / "other", "opt", "float16"), tmp_path / "store", name="other")
    predictors.write(other, predictors.maps(other, "layers", range(len(other.layout.layers))))
    with pytest.raises(UsageError, match="were converted from different checkpoints"):
        copy_all(other, stores["opt", 8])
    assert not stores["opt", 8].predictors("default").exists()
