"""SmallThinker: its checkpoints and GGUF files beside its paper's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smallthinker
import torch
from decoding import LocalDecoder
from gguf_files import of_checkpoint

from storage.convert import convert
from storage.errors import UnsupportedModel
from storage.families.registry import family_of

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(40))]
CLOSE, CLOSE_EXPERTS = 1e-3, 1e-4  # of the two best logits; of the last expert chosen and the next
FORMS: dict[str, dict[str, Any]] = {"window": {}, "plain": smallthinker.PLAIN}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_papers(tmp_path: Path, form: str, dtype: str) -> None:
    directory = smallthinker.write(tmp_path / "model", FORMS[form], dtype)
    store = convert(directory, tmp_path / "store", name="smallthinker")
    expected = smallthinker.logits(directory, PROMPT).numpy()
    assert expected.std() >= 1
    with LocalDecoder(store) as decoder:
        assert np.abs(decoder.prefill(PROMPT) - expected).max() < 1e-4
        assert np.abs(decoder.steps(PROMPT) - expected).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_64_greedy_tokens_are_the_papers(
    tmp_path: Path, form: str, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    """The paper's arithmetic on our text chooses each next token of it."""
    directory = smallthinker.write(tmp_path / "model", FORMS[form], dtype)
    tokens = list(PROMPT)
    with LocalDecoder(convert(directory, tmp_path / "store", name="smallthinker")) as decoder:
        found = decoder.prefill(tokens)[-1]
        for _ in range(64):
            tokens.append(int(found.argmax()))
            found = decoder.step(tokens[-1])
    gaps: list[torch.Tensor] = []
    top_k = smallthinker.CONFIG["moe_num_active_primary_experts"]
    expected = smallthinker.logits(
        directory, tokens, lambda scores: gaps.append(-scores.topk(top_k + 1).values.diff()[:, -1])
    )
    best = expected[len(PROMPT) - 1 : -1].topk(2)
    clear = best.values.diff().abs()[:, 0] >= CLOSE
    assert torch.equal(best.indices[clear, 0], torch.tensor(tokens[len(PROMPT) :])[clear])
    close_experts = int((torch.cat(gaps) < CLOSE_EXPERTS).sum())
    record_property("close_calls", int((~clear).sum()))
    record_property("close_experts", close_experts)
    assert len(set(tokens[len(PROMPT) :])) > 1
    assert clear.sum() > 48
    assert close_experts < 4  # of some 500


@pytest.mark.parametrize("form", FORMS)
def test_zeroing_any_stored_tensor_is_noticed(tmp_path: Path, form: str) -> None:
    store = convert(smallthinker.write(tmp_path / "model", FORMS[form]), tmp_path / "store", name="x")
    with LocalDecoder(store) as decoder:
        expected = decoder.prefill(PROMPT)
        tensors = {}
        for name in decoder.weights.names:
            vector = decoder.weights.vector(name)
            tensors[name] = vector if vector.size else decoder.weights.matrix(name).values
        for layer, units in enumerate(decoder.units):
            unit = store.layout.layers[layer].unit
            tensors |= {f"{row.role} of {layer}": unit.view(units, row.role).values for row in unit.rows}
        assert len(tensors) == 5 * 8 + (2 if form == "plain" else 3)
        for name, tensor in tensors.items():
            saved = tensor.copy()
            assert saved.any(), name
            tensor[...] = 0
            assert np.abs(decoder.prefill(PROMPT) - expected).max() > 1e-3, name
            assert np.abs(decoder.steps(PROMPT) - expected).max() > 1e-3, name
            tensor[...] = saved
        assert np.array_equal(decoder.prefill(PROMPT), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_becomes_the_store_of_its_checkpoint(tmp_path: Path, form: str) -> None:
    directory = smallthinker.write(tmp_path / "model", FORMS[form])
    theirs = convert(directory, tmp_path / "theirs", name="x")
    ours = convert(of_checkpoint(directory, tmp_path / "m.gguf"), tmp_path / "ours", name="x")
    for name in ("bundles.bin", "resident.safetensors"):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes()
    assert ours.architecture.layers == theirs.architecture.layers


def test_the_smaller_published_model() -> None:
    """Its config.json names less than this; the class has the rest."""
    config = {"model_type": "smallthinker", "rope_theta": 1.5e6}
    model = family_of(config).architecture(config)
    layer = model.layers[0]
    assert model.layers == (layer,) * 32
    assert (layer.ffn.units, layer.ffn.width, layer.ffn.activation) == (32, 768, "relu")
    assert layer.ffn.router is not None
    assert (layer.ffn.router.top_k, layer.ffn.router.reads) == (4, "layer_input")
    assert (layer.attention.window, layer.attention.rope is None, model.tied_head) == (None, False, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_enable_secondary_experts": True}, "moe_enable_secondary_experts"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"moe_enable_early_router": False}, "late routers"),
        ({"moe_layer_layout": [1, 1, 0, 1, 1]}, "dense layers"),
        ({"rope_layout": [1, 0]}, "rope_layout must be 0 or 1 for each of 5 layers"),
        ({"moe_num_active_primary_experts": 9}, "9 experts a token of 8"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], words: str) -> None:
    config = {**smallthinker.CONFIG, **changes}
    with pytest.raises(UnsupportedModel, match=words):
        family_of(config).architecture(config)
