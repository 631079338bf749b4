"""gpt-oss: its two published forms and its GGUF form are one model, beside transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import reference_model, write_checkpoint
from decoding import LocalDecoder
from gguf_files import of_checkpoint
from ring import PROMPT as RING_PROMPT
from ring import config, generate, plan_for
from safetensors.torch import load_file, save_file

from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import CheckpointError, UnsupportedModel
from storage.families.registry import family_of
from storage.manifest import RESIDENT
from storage.store import Store

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(40))]
EXPERTS, WIDTH, LAYERS = 8, 64, 3  # d_model is as wide


class Forms(NamedTuple):
    """One model three times: bfloat16, MXFP4 and a GGUF file with MXFP4 experts."""

    floats: Path
    blocks: Path
    gguf: Path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """All experts' numbers are random codes and scales; transformers says what they are."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    base = tmp_path_factory.mktemp("gpt-oss")
    # What a GGUF file cannot say is as the published models have it.
    changes = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    floats = write_checkpoint(base / "floats", "gpt-oss", "bfloat16", changes=changes)
    blocks = Path(shutil.copytree(floats, base / "blocks"))
    tensors = load_file(floats / "model.safetensors")
    packed, files = {}, {}
    generator = np.random.default_rng(0)
    for layer in range(LAYERS):
        for name, rows in (("gate_up_proj", 2 * WIDTH), ("down_proj", WIDTH)):
            codes = generator.integers(0, 16, (EXPERTS, rows, WIDTH), np.uint8)
            scales = generator.integers(121, 125, (EXPERTS, rows, WIDTH // 32), np.uint8)
            full = f"model.layers.{layer}.mlp.experts.{name}"
            packed[f"{full}_blocks"] = torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4).view(
                EXPERTS, rows, WIDTH // 32, 16
            )
            packed[f"{full}_scales"] = torch.from_numpy(scales)
            exact = convert_moe_packed_tensors(packed[f"{full}_blocks"], packed[f"{full}_scales"])
            assert exact.shape == tensors[full].shape
            tensors[full] = exact.to(torch.bfloat16).contiguous()
            files |= file_blocks(layer, name, codes, scales)
    save_file(tensors, floats / "model.safetensors")
    others = {name: value for name, value in tensors.items() if f"{name}_blocks" not in packed}
    save_file({**others, **packed}, blocks / "model.safetensors")
    said = json.loads((blocks / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (blocks / "config.json").write_text(json.dumps(said))
    return Forms(floats, blocks, of_checkpoint(floats, base / "m.gguf", instead=files))


def file_blocks(
    layer: int, name: str, codes: np.ndarray, scales: np.ndarray
) -> dict[str, tuple[np.ndarray, str]]:
    """GGUF's blocks: the scale, then bytes that hold the values i and 16 + i."""
    runs = codes.reshape(*codes.shape[:2], -1, 32)
    packed = np.concatenate([scales[..., None], runs[..., :16] | runs[..., 16:] << 4], axis=-1)
    packed = packed.reshape(*codes.shape[:2], -1)
    if name == "down_proj":
        return {f"blk.{layer}.ffn_down_exps.weight": (packed, "MXFP4")}
    return {
        f"blk.{layer}.ffn_{role}_exps.weight": (np.ascontiguousarray(packed[:, start::2]), "MXFP4")
        for start, role in enumerate(("gate", "up"))
    }


def codecs(store: Store) -> set[str]:
    return {row.codec for layer in store.layout.layers for row in layer.unit.rows}


def test_all_forms_are_one_model(forms: Forms, tmp_path: Path) -> None:
    stores = [convert(path, tmp_path / path.name, name="x") for path in forms]
    floats, blocks, file = stores
    assert [codecs(store) for store in stores] == [{"bfloat16"}, {"mxfp4"}, {"mxfp4"}]
    assert (blocks.path / "bundles.bin").read_bytes() == (file.path / "bundles.bin").read_bytes()
    assert (blocks.path / RESIDENT).read_bytes() == (floats.path / RESIDENT).read_bytes()
    sixteen = convert(forms.blocks, tmp_path / "sixteen", name="x", bits=16)
    assert codecs(sixteen) == {"bfloat16"}
    for layer in range(LAYERS):
        exact = floats.ffn(layer, "gate", "up", "down")
        for other in (blocks, sixteen):
            found = other.ffn(layer, "gate", "up", "down")
            assert all(
                np.array_equal(one.widened(), two.widened()) for one, two in zip(exact, found, strict=True)
            )
    with torch.no_grad():
        expected = reference_model(forms.floats)(torch.tensor([PROMPT])).logits[0].numpy()
    assert expected.std() >= 1
    for store in stores:
        with LocalDecoder(store) as decoder:
            assert np.abs(decoder.prefill(PROMPT) - expected).max() < 1e-4
            assert np.abs(decoder.steps(PROMPT) - expected).max() < 1e-4


@pytest.mark.parametrize("variant", ["gpt-oss", "gpt-oss-plain"])
def test_one_token_and_many_are_the_reference(tmp_path: Path, variant: str) -> None:
    """With gates that are clamped, sinks, windows, and biases everywhere."""
    directory = write_checkpoint(tmp_path / "model", variant)
    store = convert(directory, tmp_path / "store", name="x")
    with torch.no_grad():
        expected = reference_model(directory)(torch.tensor([PROMPT])).logits[0].numpy()
    with LocalDecoder(store) as decoder:
        assert np.abs(decoder.prefill(PROMPT) - expected).max() < 1e-4
        assert np.abs(decoder.steps(PROMPT) - expected).max() < 1e-4


@pytest.mark.ring
def test_a_ring_with_fewer_slots_than_experts_writes_the_decoders_text(forms: Forms, tmp_path: Path) -> None:
    store = convert(forms.blocks, tmp_path / "store", name="x")
    chosen = config(predictor={"kind": "auto", "refine": None})
    made = plan_for(store, chosen)
    assert (made.forecast.kind, made.slots, made.units) == ("router", (3, 3, 3), (8, 8, 8))
    with Session(store, chosen, made) as session:
        found = generate(session).tokens
    with LocalDecoder(store) as decoder:
        logits, expected = decoder.prefill(RING_PROMPT)[-1], []
        for _ in found:
            expected.append(int(logits.argmax()))
            logits = decoder.step(expected[-1])
    assert found == expected


def test_every_stored_tensor_matters(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "gpt-oss", changes={"num_hidden_layers": 2})
    store = convert(directory, tmp_path / "store", name="x")
    with LocalDecoder(store) as decoder:
        before = decoder.prefill(PROMPT)
    whole = load_file(store.path / RESIDENT)
    for name in whole:
        save_file({**whole, name: torch.zeros_like(whole[name])}, store.path / RESIDENT)
        with LocalDecoder(store) as decoder:
            assert np.abs(decoder.prefill(PROMPT) - before).max() > 1e-3, name


def changed(forms: Forms, to: Path, change: Any) -> Path:
    """The MXFP4 form with its tensors changed by a function."""
    directory = Path(shutil.copytree(forms.blocks, to))
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


NAME = "model.layers.1.mlp.experts.gate_up_proj"


def test_damaged_blocks_are_one_sentence(forms: Forms, tmp_path: Path) -> None:
    def widths(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{NAME}_scales"] = tensors[f"{NAME}_scales"][:, :-1].contiguous()

    def fewer(tensors: dict[str, torch.Tensor]) -> None:
        for kind in ("blocks", "scales"):
            tensors[f"{NAME}_{kind}"] = tensors[f"{NAME}_{kind}"][:, :-2].contiguous()

    for number, (change, words) in enumerate(
        (
            (
                lambda tensors: tensors.pop(f"{NAME}_scales"),
                "gate_up_proj_blocks and its scales make no MXFP4",
            ),
            (
                lambda tensors: tensors.pop(f"{NAME}_blocks"),
                r"lacks the tensor model.layers.1.mlp.experts.0.gate",
            ),
            (widths, "gate_up_proj_blocks and its scales make no MXFP4"),
            (fewer, r"has experts of the shape \[63, 64\] where config.json asks for \[64, 64\]"),
        )
    ):
        directory = changed(forms, tmp_path / str(number), change)
        with pytest.raises(CheckpointError, match=words):
            convert(directory, tmp_path / "store", name="x")


def test_the_larger_published_model() -> None:
    """Its config.json, but for what says the same twice."""
    config = {
        "model_type": "gpt_oss",
        "num_local_experts": 32,
        "num_hidden_layers": 24,
        "quantization_config": {"quant_method": "mxfp4"},
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "eos_token_id": 200002,
    }
    model = family_of(config).architecture(config)
    first, second = model.layers[:2]
    assert model.layers == (first, second) * 12
    assert (first.attention.window, second.attention.window, first.attention.sinks) == (128, None, True)
    assert (first.ffn.units, first.ffn.width, first.ffn.limit, first.ffn.alpha) == (32, 2880, 7.0, 1.702)
    assert model == family_of(config).architecture({**config, "rope_scaling": None})  # which is the default
    with pytest.raises(UnsupportedModel, match="quantised checkpoints"):
        family_of({**config, "quantization_config": {"quant_method": "gptq"}})
