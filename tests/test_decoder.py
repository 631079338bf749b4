"""The decoder against transformers, on small checkpoints with every parameter random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, GATED, MIXTURES, UNKNOWN, VARIANTS, make_model, write_checkpoint
from decoding import LocalDecoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from storage.architecture import Ffn
from storage.codecs import FLOAT32
from storage.convert import convert
from storage.layout import Rows, neuron
from storage.manifest import RESIDENT
from storage.store import Store
from workers.compute.bound import BoundLayer, Linear
from workers.compute.cpu import batch
from workers.compute.cpu.batch import BatchFfn
from workers.compute.cpu.device import CpuDevice
from workers.compute.cpu.pool import Pool
from workers.compute.weights import Weights
from workers.lab.offline.dense import DenseModel

PROMPT = [2, 17, 40, 9, 77, 31, 250, 6, 101, 4, 55, 260]
LONG = [2, *(5 + (17 * i) % 250 for i in range(40))]  # beyond the windows and original contexts of GATED
TOLERANCE = 1e-4
CLOSE = 1e-3  # between the reference's two best: either may be chosen
CLOSE_EXPERTS = 1e-4  # between the last expert that a router chooses and the next


pytestmark = pytest.mark.usefixtures("one_thread")


def _store(base: Path, variant: str, dtype: str) -> Store:
    return convert(write_checkpoint(base / "checkpoint", variant, dtype), base / "store", name=variant)


def _reference(variant: str, dtype: str) -> Any:
    """The rounded weights in a float32 model; casting the model itself would round its rotary angles."""
    model = make_model(variant, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    return model


def _logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def _prompt(variant: str) -> list[int]:
    return LONG if variant in {*GATED, *UNKNOWN} else PROMPT


CASES = [(variant, "float32") for variant in (*VARIANTS, *UNKNOWN)] + [
    (variant, dtype) for variant in ("opt", "falcon-7b", "falcon-rw", *GATED) for dtype in DTYPES[1:]
]


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_logits_are_transformers(tmp_path, variant, dtype):
    prompt = _prompt(variant)
    expected = _logits(_reference(variant, dtype), prompt)
    assert expected.std() >= 1
    with LocalDecoder(_store(tmp_path, variant, dtype)) as decoder:
        assert np.abs(decoder.prefill(prompt) - expected).max() < TOLERANCE
        assert np.abs(decoder.steps(prompt) - expected).max() < TOLERANCE


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_64_greedy_tokens_are_transformers(tmp_path, variant, dtype, record_property):
    model = _reference(variant, dtype)
    close = close_experts = 0
    routing = {"output_router_logits": True} if variant in MIXTURES else {}
    tokens = list(_prompt(variant))
    with LocalDecoder(_store(tmp_path, variant, dtype)) as decoder:
        logits = decoder.prefill(tokens)[-1]
        past = None
        fed = tokens
        for _ in range(64):
            with torch.no_grad():
                result = model(torch.tensor([fed]), past_key_values=past, use_cache=True, **routing)
            past = result.past_key_values
            if routing:
                close_experts += _near_ties(result.router_logits, model.config.num_experts_per_tok)
            best = result.logits[0, -1].topk(2)
            expected = int(best.indices[0])
            if float(best.values[0] - best.values[1]) < CLOSE:
                close += 1
            else:
                assert int(np.argmax(logits)) == expected
            fed = [expected]
            tokens.append(expected)
            logits = decoder.step(expected)
    record_property("close_calls", close)
    record_property("close_experts", close_experts)
    print(f"{variant} {dtype}: {close} of 64 tokens and {close_experts} choices of experts were close")
    assert close < 16
    assert close_experts < 4  # of some 300


def _near_ties(logits: tuple[torch.Tensor, ...], top_k: int) -> int:
    """Of each layer's router logits [tokens, experts]: rows that leave open which expert is the last."""
    best = (one.topk(top_k + 1, dim=-1).values for one in logits)
    return sum(int((one[:, -2] - one[:, -1] < CLOSE_EXPERTS).sum()) for one in best)


@pytest.mark.parametrize("variant", [*VARIANTS, *UNKNOWN])
def test_zeroing_any_stored_tensor_is_noticed(tmp_path, variant):
    store, prompt = _store(tmp_path, variant, "float32"), _prompt(variant)
    expected = _logits(_reference(variant, "float32"), prompt)
    with LocalDecoder(store) as decoder:
        with safe_open(store.path / RESIDENT, "np") as file:
            assert set(decoder.weights.names) == set(file.keys())
        tensors = {name: _tensor(decoder, name) for name in decoder.weights.names}
        for layer, units in enumerate(decoder.units):
            unit = store.layout.layers[layer].unit
            for row in unit.rows if len(units) else ():
                tensors[f"{row.role} rows of layer {layer}"] = unit.view(units, row.role).values
        for name, tensor in tensors.items():
            saved = tensor.copy()
            if variant == "opt-no-affine" and name.endswith("norm.bias"):
                assert not saved.any()  # the identity, which the conversion writes out
                continue
            assert saved.any(), name
            tensor[...] = 0
            assert np.abs(decoder.prefill(prompt) - expected).max() > TOLERANCE, name
            assert np.abs(decoder.steps(prompt) - expected).max() > TOLERANCE, name
            tensor[...] = saved
        assert np.abs(decoder.prefill(prompt) - expected).max() < TOLERANCE
        assert np.abs(decoder.steps(prompt) - expected).max() < TOLERANCE


def _tensor(decoder: LocalDecoder, name: str) -> np.ndarray:
    vector = decoder.weights.vector(name)
    return vector if vector.size else decoder.weights.matrix(name).values


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_norms_may_be_float32_beside_16_bits(tmp_path, variant, dtype):
    checkpoint = write_checkpoint(tmp_path / "model", variant, dtype)
    usual = convert(checkpoint, tmp_path / "usual", name=variant)
    tensors = load_file(checkpoint / "model.safetensors")
    wide = {name: value.float() if value.ndim == 1 else value for name, value in tensors.items()}
    assert {value.dtype for value in wide.values()} == {torch.float32, getattr(torch, dtype)}
    save_file(wide, checkpoint / "model.safetensors")
    mixed = convert(checkpoint, tmp_path / "mixed", name=variant)
    assert mixed.manifest.files[RESIDENT].bytes > usual.manifest.files[RESIDENT].bytes
    with LocalDecoder(mixed) as decoder, LocalDecoder(usual) as expected:
        assert np.array_equal(decoder.prefill(LONG), expected.prefill(LONG))
        assert np.array_equal(decoder.steps(LONG), expected.steps(LONG))


@pytest.mark.parametrize("variant", ["opt", "falcon-40b", "gemma2", "qwen3"])
def test_threads_do_not_change_a_bit(tmp_path, variant):
    store = _store(tmp_path, variant, "bfloat16")
    results = []
    for threads in (1, 2):
        with LocalDecoder(store, threads=threads) as decoder:
            results.append(decoder.prefill(PROMPT).tobytes() + decoder.steps(PROMPT).tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "variant", ["opt", "falcon-7b", "falcon-rw", "falcon-40b", "gemma2", "qwen3", "olmo2", "phi3-longrope"]
)
def test_attention_does_not_depend_on_how_a_prompt_is_cut(tmp_path, variant, monkeypatch):
    """Into queries computed at once, and into tokens that are known already and new ones."""
    store = _store(tmp_path, variant, "float32")
    x = np.random.default_rng(0).standard_normal((12, store.architecture.d_model), np.float32)
    device = CpuDevice(Weights(store), 12, 2)
    device.begin(0, 12, every=True)
    whole = device.attention(0, x)
    keys = device.cache.keys[0].copy()
    monkeypatch.setattr(batch, "QUERIES", 3)
    device.begin(0, 7, every=True)
    first = device.attention(0, x[:7])
    device.begin(7, 5, every=True)
    rest = device.attention(0, x[7:])
    device.close()
    assert whole.std() > 0.01
    assert np.allclose(np.concatenate((first, rest)), whole, atol=1e-5)
    assert np.allclose(device.cache.keys[0], keys, atol=1e-5)


def test_the_dense_model_is_the_decoder(tmp_path):
    store = _store(tmp_path, "falcon-rw", "float16")
    other = PROMPT[::-1]
    with LocalDecoder(store) as decoder, DenseModel(store, 1) as dense:
        logits = dense.forward([PROMPT, other])
        assert np.allclose(logits[0].numpy(), decoder.prefill(PROMPT), atol=TOLERANCE)
        assert np.allclose(logits[1].numpy(), decoder.prefill(other), atol=TOLERANCE)
        shapes = {index: tuple(hidden.shape) for index, hidden in dense.layers([PROMPT])}
    assert shapes == dict.fromkeys(
        range(len(store.layout.layers)), (1, len(PROMPT), store.architecture.d_model)
    )


def test_a_mask_of_the_active_neurons_changes_nothing(tmp_path):
    store = _store(tmp_path, "opt", "float32")
    width, neurons = store.architecture.d_model, store.layout.most_units

    def active(index: int, announced: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        up = torch.from_numpy(store.ffn(index, "up")[0].widened())
        bias = torch.from_numpy(weights.vector(f"layers.{index}.up.bias"))
        assert hidden.shape == (len(PROMPT), width)
        return hidden @ up.T + bias > 0

    with DenseModel(store, 1) as dense:
        weights = Weights(store)
        plain = dense.forward([PROMPT])
        assert torch.allclose(dense.forward([PROMPT], active), plain, atol=1e-5)
        silent = dense.forward([PROMPT], lambda _, __, hidden: torch.zeros(len(hidden), neurons).bool())
        assert not torch.allclose(silent, plain, atol=0.1)


@pytest.mark.parametrize("cuts", [[1], [255, 256, 257], [64, 128, 300, 511], [600]])
def test_a_prefill_does_not_depend_on_its_parts(cuts):
    rng = np.random.default_rng(0)
    unit = neuron("float32", 96)
    bundles = rng.standard_normal((700, 2 * 96), np.float32)
    linear = Linear("", Rows.of_matrix(np.zeros((0, 96), np.float32), FLOAT32), np.zeros(0, np.float32))
    biases = rng.standard_normal(700, np.float32), rng.standard_normal(96, np.float32)
    bound = BoundLayer({}, linear, linear, *biases)
    hidden = rng.standard_normal((5, 96), np.float32)
    ids = np.arange(700, dtype=np.int32)
    outputs = []
    pool = Pool(1)
    for parts in ([ids], np.split(ids, cuts)):
        ffn = BatchFfn(bound, unit, Ffn("plain", 700, 1, "gelu"), hidden, pool)
        for part in parts:
            # The slots are reused at once, as staging is.
            staging = np.zeros((part.size, unit.stride), np.uint8)
            staging[:, : unit.bytes] = bundles[part].view(np.uint8)
            ffn.add(part, np.arange(part.size, dtype=np.int32), staging)
            ffn.close()
            staging[...] = 255  # not a number
        outputs.append(ffn.finish().tobytes())
    pool.close()
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("variant", "known"),
    [("opt", False), ("opt-post-norm", False), ("falcon-7b", True), ("falcon-rw", False)],
)
def test_what_is_announced_early_lacks_the_layers_attention(tmp_path, variant, known):
    store = _store(tmp_path, variant, "float32")
    heard = {}

    def keep(index: int, announced: torch.Tensor, hidden: torch.Tensor) -> None:
        heard[index] = (announced.clone(), hidden.clone())

    with DenseModel(store, 1) as dense, torch.no_grad():
        x = dense.embed([PROMPT])
        plain, y = dense.layer(0, x, keep)
        assert torch.equal(*heard[0])
        again, z = dense.layer(0, x, keep, early=True)
        assert torch.equal(plain, again)
        assert torch.equal(y, z)
        assert torch.equal(*heard[0]) == known
        if not known:
            name = "layers.0.norm" if variant == "opt-post-norm" else "layers.0.ffn_norm"
            weights = Weights(store)
            parameters = [torch.from_numpy(weights.vector(f"{name}.{part}")) for part in ("weight", "bias")]
            wanted = torch.nn.functional.layer_norm(x, x.shape[-1:], *parameters)[0]
            assert torch.allclose(heard[0][0], wanted, atol=1e-5)
