"""Stores on paper: their sizes are those of a real conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from pipeline.models.names import presets
from pipeline.models.published import PUBLISHED
from storage.convert import convert
from storage.convert.paper import on_paper
from storage.manifest import BUNDLES, RESIDENT

VARIANTS = ("opt", "opt-post-norm", "falcon-7b", "falcon-40b", "llama", "gemma3", "qwen3", "qwen3-moe")


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_store_on_paper_is_laid_out_as_its_conversion(
    tmp_path: Path, variant: str, bits: int | None
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", variant, "float16")
    made = convert(checkpoint, tmp_path / "store", name=variant, bits=bits)
    paper = on_paper(variant, json.loads((checkpoint / "config.json").read_text()), "float16", bits).store
    assert paper.layout == made.layout
    assert paper.architecture.layers == made.architecture.layers
    for name in (BUNDLES, RESIDENT):
        assert paper.manifest.files[name].bytes == made.manifest.files[name].bytes


def test_every_preset_of_the_hub_has_a_shape() -> None:
    assert set(presets()) - {"builtin", "builtin-moe"} == set(PUBLISHED)


@pytest.mark.parametrize(
    ("preset", "gigabytes"), [("opt-6.7b", 13.32), ("falcon-7b", 13.84), ("llama-3.1-8b-instruct", 16.06)]
)
def test_published_models_have_their_published_sizes(preset: str, gigabytes: float) -> None:
    shape = PUBLISHED[preset]
    store = on_paper(preset, shape.config, shape.dtype).store
    total = store.layout.useful_bytes + store.manifest.files[RESIDENT].bytes
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.002)
