"""The built-in model's siblings: trained small, exported, converted, and what transformers reads of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import VOCABULARY, make_tokenizer, reference_model
from decoding import LocalDecoder

from storage.builtin import corpus, train
from storage.builtin.network import Network, Shape
from storage.builtin.plot import read_log
from storage.builtin.train import FFN_WIDTH, Architecture, Recipe
from storage.builtin.validate import load
from storage.convert import convert

SIBLINGS = (Architecture.QWEN3, Architecture.FALCON)
SMALL = Shape(d_model=32, d_ff=48, layers=2, heads=4, vocabulary=VOCABULARY)
RECIPE = Recipe(stable_steps=6, cooldown_steps=2, warmup_steps=1, adam_rate=0.03, target_share=0.0)
STORY = "Once upon a time there was a little fox. Every evening the fox counted the stars above the hill. "
PROMPT = [2, *(5 + (17 * i) % 250 for i in range(40))]


class Trained(NamedTuple):
    architecture: Architecture
    network: Network
    run: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoint"


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(architecture: Architecture, recipe: Recipe, run: Path) -> Network:
    """A small network trained on one story, from `run`'s last checkpoint if it has one."""
    stream = np.array(make_tokenizer().encode(STORY * 60).ids, np.uint16)
    mixture = corpus.Mixture(dict.fromkeys(corpus.SOURCES, stream))
    held_out = torch.from_numpy(stream[:129].astype(np.int64))[None]
    torch.manual_seed(recipe.seed)
    network = train.build(architecture, SMALL)
    train.train(network, mixture, held_out, recipe, run)
    return network


@pytest.fixture(scope="module", params=SIBLINGS)
def sibling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = tmp_path_factory.mktemp(request.param)
    network = trained(request.param, RECIPE, run)
    train.write_checkpoint(network, make_tokenizer(), run / "checkpoint")
    return Trained(request.param, network, run)


def test_the_loss_falls(sibling: Trained) -> None:
    records = read_log(sibling.run / "log.jsonl")
    assert len(records) == RECIPE.steps
    assert records[0]["loss"] == pytest.approx(np.log(VOCABULARY), abs=0.1)  # nothing known yet
    assert records[-1]["loss"] < 4.5
    assert records[-1]["valid"] < 4.5


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = replace(RECIPE, stable_steps=4, cooldown_steps=0)
    straight = trained(Architecture.QWEN3, whole, tmp_path)
    (tmp_path / "last.pt").unlink()
    trained(Architecture.QWEN3, replace(whole, stable_steps=2), tmp_path)
    resumed = trained(Architecture.QWEN3, whole, tmp_path)
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@torch.no_grad()
def test_the_store_computes_what_transformers_reads(sibling: Trained, tmp_path: Path) -> None:
    """And every tensor of the checkpoint is in 16 bits, none missing and none unknown."""
    from transformers import AutoModelForCausalLM

    stored, said = AutoModelForCausalLM.from_pretrained(sibling.checkpoint, output_loading_info=True)
    config = json.loads((sibling.checkpoint / "config.json").read_text(encoding="utf-8"))
    assert [type(stored).__name__] == config["architectures"]
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    expected = reference_model(sibling.checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
    assert expected.std() > 1
    with LocalDecoder(convert(sibling.checkpoint, tmp_path / "store", name="sibling")) as decoder:
        assert np.abs(decoder.prefill(PROMPT) - expected).max() < 1e-4
        assert np.abs(decoder.steps(PROMPT) - expected).max() < 1e-4


@torch.no_grad()
def test_validation_reads_the_checkpoint(sibling: Trained) -> None:
    """It scores the stored weights, which are the trained ones rounded."""
    ids = torch.tensor([PROMPT])
    network = load(sibling.checkpoint)
    hidden, _ = network(ids)
    expected = reference_model(sibling.checkpoint)(ids).logits
    torch.testing.assert_close(hidden @ network.head.T, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(network.parameters(), sibling.network.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16).float())


@pytest.mark.parametrize("architecture", SIBLINGS)
def test_at_full_size_it_is_the_built_in_models_peer(architecture: Architecture) -> None:
    """Some 12 million parameters, trained in float32, whatever precision the checkpoint names."""
    network = train.build(architecture, Shape(d_ff=FFN_WIDTH[architecture] * Shape().d_model))
    built_in = train.build(Architecture.OPT, Shape())
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (network, built_in)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
