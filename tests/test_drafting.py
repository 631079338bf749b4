"""What drafts come from, how many pay, and which rings have any."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoints import write_checkpoint
from decoding import LocalDecoder
from hypothesis import given
from hypothesis import strategies as st
from ring import config
from test_engine import PROMPT

from pipeline.planner.divide import plan as make_plan
from pipeline.ring.sampling import Sampling
from storage.codecs import FLOAT32
from storage.convert import convert
from storage.errors import ConfigError
from storage.manifest import MANIFEST, SEAL
from storage.store import Store
from workers.compute.drafts.lookup import LONGEST, Lookup
from workers.compute.drafts.model import ModelDrafts
from workers.compute.drafts.worth import AGAIN, KNOWN, MOST_LOST, Worth
from workers.compute.sampling import choose


def made(base: Path, variant: str) -> Store:
    return convert(write_checkpoint(base / "checkpoint", variant), base / "store", name=variant)


# -- look-up --------------------------------------------------------------------------------------


def test_the_longest_match_wins_and_of_equals_the_latest() -> None:
    source = Lookup()
    text = [7, 1, 2, 3, 50, 51, 8, 1, 2, 3, 60, 61, 9, 2, 3, 70, 71, 7, 1, 2, 3]
    source.begin((), Sampling())
    assert source.trust(text) == 4
    assert source.draft(text, 3, 0) == [50, 51, 8]
    text = [*text, 99, 8, 2, 3]
    assert source.trust(text) == 2
    assert source.draft(text, 2, 0) == [99, 8]
    assert source.trust([*text, 5]) == 0


def test_a_text_that_goes_round_is_drafted_round() -> None:
    source = Lookup()
    source.begin((), Sampling())
    text = [1, 2, 3] * 3
    assert source.trust(text) == 6
    assert source.draft(text, 7, 0) == [1, 2, 3, 1, 2, 3, 1]
    source.begin((), Sampling())
    assert source.trust([4] * 40) == LONGEST
    assert source.draft([4] * 40, 3, 0) == [4, 4, 4]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 7))
def test_drafts_followed_the_same_tokens_before(text: list[int], count: int) -> None:
    """However the text has grown."""
    source = Lookup()
    source.begin((), Sampling())
    for length in range(len(text) + 1):
        trust = source.trust(text[:length])
    before = list(itertools.pairwise(text[:-1]))
    assert bool(trust) == (tuple(text[-2:]) in before)
    if trust:
        drafts = source.draft(text, count, 0)
        whole = [*text, *drafts]
        places = [at for at in range(trust, len(text)) if whole[at - trust : at] == text[-trust:]]
        assert len(drafts) == count
        assert any(whole[at : at + count] == drafts for at in places)


# -- a draft model --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0, 0.9, 7)], ids=["greedy", "sampled"])
def test_a_model_drafts_what_it_would_write(tmp_path: Path, sampling: Sampling) -> None:
    """Also behind a text that went on otherwise, and behind one that is longer than a piece."""
    small = made(tmp_path, "llama")
    rest = list(range(3, 40))
    drafting = ModelDrafts(small, small.architecture.vocabulary, 128, 1, FLOAT32)
    try:
        drafting.begin(PROMPT, sampling)
        for text in (list(PROMPT), [*PROMPT, 7, 8], [*PROMPT, 7, 9, 11], [2, *rest, *rest]):
            with LocalDecoder(small) as decoder:
                logits, expected = decoder.prefill(text)[-1], []
                for index in range(5, 9):
                    expected.append(choose(logits, sampling, index))
                    logits = decoder.step(expected[-1])
            assert drafting.trust(text) == 7
            assert drafting.draft(text, 4, 5) == expected
        assert drafting.trust([0] * 125) == 0, "beyond its context"
    finally:
        drafting.close()


# -- what pays ------------------------------------------------------------------------------------

STEP = 1.0  # second


def simulated(row: float, comes_true: Sequence[float], most: int = 4, tokens: int = 4000) -> dict[str, float]:
    """A text decoded by the rule alone; each further row costs `row` seconds, and drafts of trust 4 are in
    turn as likely as these numbers say, over equal stretches of the text.
    """
    draw = np.random.default_rng(1)
    worth, seconds, done, steps, drafted = Worth(most), 0.0, 0, 0, 0
    while done < tokens:
        chance = comes_true[done * len(comes_true) // tokens]
        count = worth.count(4, most)
        accepted = 0
        while accepted < count and draw.random() < chance:
            accepted += 1
        took = (STEP + count * row) * draw.uniform(0.97, 1.03)
        worth.took(4, count, accepted, took)
        seconds, done = seconds + took, done + 1 + accepted
        steps, drafted = steps + 1, drafted + count
    return {"seconds": seconds / done, "drafted": drafted / done, "steps": steps / done}


def test_drafts_that_come_true_are_verified_as_many_as_there_are() -> None:
    found = simulated(0.05, [0.97])
    assert found["steps"] < 0.25
    assert found["seconds"] < 0.3


@pytest.mark.parametrize(("row", "chance"), [(0.4, 0.1), (1.0, 0.5), (1.0, 0.98), (0.05, 0.0)])
def test_drafts_that_do_not_pay_cost_next_to_nothing(row: float, chance: float) -> None:
    found = simulated(row, [chance])
    assert found["seconds"] < 1 + MOST_LOST + 0.005
    assert found["drafted"] > 0, "they are tried again"


def test_what_begins_to_pay_is_found() -> None:
    assert simulated(0.3, [0.05, 0.95])["seconds"] < 0.5 * (1.02 + 0.65)


def test_nothing_is_drafted_before_a_step_was_measured_nor_without_end() -> None:
    worth = Worth(4)
    for _ in range(KNOWN):
        assert worth.count(9, 4) == 0
        worth.took(0, 0, 0, STEP)
    assert worth.count(9, 4) > 0
    assert worth.count(0, 4) == worth.count(9, 0) == 0
    assert worth.count(9, 1) == worth.count(1, 4) == 1
    for _ in range(AGAIN):
        worth.took(9, 4, 4, STEP)
    assert worth.count(9, 4) == 0
    worth.took(0, 0, 0, STEP)
    assert worth.count(9, 4) == 4


# -- who drafts -----------------------------------------------------------------------------------


PLANNED = pytest.mark.kernels("drafts are planned where the kernels compute")


@PLANNED
def test_a_plan_drafts_where_every_token_reads_the_same(tmp_path: Path) -> None:
    dense, sparse = made(tmp_path / "dense", "falcon-7b"), made(tmp_path / "sparse", "opt")
    everything = {"predictor": {"kind": "all", "refine": False}}
    assert make_plan(dense, config(**everything)).plan.drafts == 7
    assert make_plan(dense, config(**everything, drafts={"length": 4})).plan.drafts == 4
    assert make_plan(dense, config(**everything, drafts={"kind": "off"})).plan.drafts == 0
    whole = {**everything, "cache": {"share": 1.0}}
    assert make_plan(dense, config(**whole)).plan.drafts == 0
    assert make_plan(dense, config(**whole, drafts={"kind": "lookup"})).plan.drafts == 7
    assert make_plan(sparse, config()).plan.drafts == 0
    assert make_plan(sparse, config(**everything)).plan.drafts == 7
    with pytest.raises(ConfigError, match=r"needs predictor\.kind all: with predicted sets"):
        make_plan(sparse, config(drafts={"kind": "lookup"}))


@PLANNED
def test_a_mixtures_tokens_come_one_by_one(tmp_path: Path) -> None:
    mixture = made(tmp_path, "qwen3-moe")
    asked = {"predictor": {"kind": "router", "refine": None}, "cache": {"share": 0.5}}
    assert make_plan(mixture, config(**asked)).plan.drafts == 0
    with pytest.raises(ConfigError, match="is a mixture of experts"):
        make_plan(mixture, config(**asked, drafts={"kind": "lookup"}))


def _list_again(store: Store, file: Path) -> None:
    """Enter a changed file into the manifest, which then has no seal."""
    path, data = store.path / MANIFEST, file.read_bytes()
    manifest = json.loads(path.read_text())
    manifest["files"][file.name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    del manifest[SEAL]
    path.write_text(json.dumps(manifest))


@PLANNED
def test_a_draft_model_has_the_same_tokens_and_a_place_in_the_plan(tmp_path: Path) -> None:
    big, small = made(tmp_path / "big", "falcon-7b"), made(tmp_path / "small", "llama")
    everything = {"predictor": {"kind": "all", "refine": False}}
    chosen = config(**everything, drafts={"kind": "model", "model": str(small.path)})
    report = make_plan(big, chosen)
    weights = sum(small.manifest.files[name].bytes for name in ("resident.safetensors", "bundles.bin"))
    assert report.plan.drafts == 7
    assert report.parts["draft model"] > weights
    with pytest.raises(ConfigError, match=r"drafts\.kind model needs drafts\.model"):
        make_plan(big, config(**everything, drafts={"kind": "model"}))
    with pytest.raises(ConfigError, match=r"drafts\.model: "):
        make_plan(big, config(**everything, drafts={"kind": "model", "model": str(tmp_path)}))
    tokenizer = small.path / "tokenizer.json"
    words = tokenizer.read_text().replace('"A":', '"?":').replace('"B":', '"A":').replace('"?":', '"B":')
    tokenizer.write_text(words)
    _list_again(small, tokenizer)
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        make_plan(big, chosen)
