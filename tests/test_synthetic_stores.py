"""Synthetic models written straight into a store: byte for byte what their checkpoints convert to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_synthesize import BUILTIN, LAYERS, TINY, tiny

from storage.codecs import CODECS
from storage.convert import convert
from storage.convert.recipe import Recipe
from storage.errors import StoreIncomplete, UsageError
from storage.manifest import RESIDENT
from storage.tensors import Tensors
from workers.lab.synthesis import __main__ as program
from workers.lab.synthesis import drawn
from workers.lab.synthesis.checkpoint import Request, synthesize
from workers.lab.synthesis.direct import write_store
from workers.lab.synthesis.measure import measure
from workers.lab.synthesis.sources import open_weights

FOUR = Recipe.of(4)
SHAPES = {**TINY, "silu": tiny("llama-3.1-8b")}  # whose neurons are read in units of several


@pytest.mark.parametrize(
    ("name", "bits"),
    [("opt", 4), ("falcon-7b", 4), ("falcon-40b", 8), ("llama-relu", 4), ("minicpm-s", 16), ("silu", 4)],
)
def test_the_store_is_the_one_that_the_checkpoint_converts_to(name: str, bits: int, tmp_path: Path) -> None:
    request = Request(SHAPES[name], layers=LAYERS, seed=3, tokenizer=BUILTIN)
    with torch.no_grad():
        synthesize(request, tmp_path / "checkpoint")
    converted = convert(tmp_path / "checkpoint", tmp_path / "converted", name="any", bits=bits)
    written = write_store(request, Recipe.of(bits), tmp_path / "written")
    assert written.manifest.files == converted.manifest.files
    assert written.architecture == converted.architecture
    assert written.layout == converted.layout
    marks = [store.manifest.parameters["synthetic"] for store in (written, converted)]
    assert marks[0] == marks[1]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "converted", "written"}


class Stopped(Exception):
    """A conversion's process is gone."""


@pytest.mark.parametrize("after", [5, 7])
def test_what_was_stopped_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer's FFN, and in the attention behind all of them; no layer's FFN is drawn twice."""
    request = Request(TINY["opt"], layers=LAYERS)
    whole = write_store(request, FOUR, tmp_path / "whole")
    drawings: list[str] = []

    def counting(make: Callable[..., object], name: str, most: int) -> Callable[..., object]:
        def made(recipe: object, layer: int, *rest: object) -> object:
            drawings.append(f"{name} {layer}")
            if len(drawings) > most:
                raise Stopped
            return make(recipe, layer, *rest)

        return made

    attention, ffn = drawn.make_attention, drawn.make_ffn
    for most in (after, 1000):
        monkeypatch.setattr(drawn, "make_attention", counting(attention, "attention", most))
        monkeypatch.setattr(drawn, "make_ffn", counting(ffn, "ffn", most))
        if most == after:
            with pytest.raises(Stopped):
                write_store(request, FOUR, tmp_path / "out")
            assert drawings.pop() == {5: "ffn 2", 7: "attention 1"}[after]
            with pytest.raises(StoreIncomplete, match="with other parameters"):
                write_store(replace(request, seed=1), FOUR, tmp_path / "out")
    store = write_store(request, FOUR, tmp_path / "out")
    write_store(request, FOUR, tmp_path / "out")  # draws nothing
    assert store.manifest.files == whole.manifest.files
    assert [drawings.count(f"ffn {layer}") for layer in range(LAYERS)] == [1, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_small_has_four_bits_in_attention(tmp_path: Path) -> None:
    request = Request(TINY["opt"], layers=2)
    usual = write_store(request, FOUR, tmp_path / "usual")
    small = write_store(request, Recipe.small(), tmp_path / "small")
    assert {row.codec for row in small.layout.layers[0].unit.rows} == {"q4s"}
    tensors, eight = Tensors(small.path / RESIDENT), Tensors(usual.path / RESIDENT)
    assert {tensors.dtype(f"layers.1.{part}.weight") for part in ("qkv", "out")} == {"q4s"}
    assert tensors.dtype("embed.weight") == "q8"
    rows, exact = (
        torch.from_numpy(CODECS[one.dtype(name)].widen(one.read(name)))
        for one in (tensors, eight)
        for name in ("layers.1.out.weight",)
    )
    assert 0.01 < float((rows - exact).norm() / exact.norm()) < 0.12
    with pytest.raises(UsageError, match="another checkpoint or of other"):
        write_store(request, Recipe.small(), tmp_path / "usual")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--small"], "--small is for --bits 4"),
        (["--small", "--bits", "8"], "--small is for --bits 4"),
        (["--bits", "5"], "16, 8 or 4, not 5"),
        (["--bits", "4", "--no-locality"], "--no-locality is for mixtures"),
        (["--bits", "4", "--tokenizer", "/nowhere"], "no tokenizer.json"),
    ],
)
def test_what_cannot_be_written_is_refused(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["synthesize", "--shape", "opt-125m", "--out", str(out), *options])
    assert program.run() != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_planted_activity_stays_in_few_bits(tmp_path: Path) -> None:
    text = [(37 * token * token + 11) % 512 for token in range(128)]
    found = []
    for recipe in (Recipe.of(16), Recipe.small()):
        store = write_store(Request(TINY["opt"], layers=2), recipe, tmp_path / str(recipe.bits))
        found.append([report.active for report in measure(open_weights(store.path), text, 16)])
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert 0.02 < found[1][0] < 0.06
