"""SmallThinker: its checkpoints and GGUF files beside its paper's arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smallthinker
from decoding import LocalDecoder
from gguf_files import of_checkpoint

from storage.convert import convert
from storage.errors import UnsupportedModel
from storage.families.registry import family_of

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(40))]
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
