"""Several tokens a step: rows have one token's bits, drafts change no text, and cost next to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GATED, VARIANTS, write_checkpoint
from decoding import LocalDecoder
from gguf_files import of_checkpoint
from ring import config, plan_for
from ring import generate as in_ring
from stores import architecture
from test_engine import PROMPT, FakeRing, generate, ring

from pipeline.ring.messages import Cancel, Finished, Generate, Message, TokenReady
from pipeline.ring.plan import STEP_ROWS, Forecast, Plan
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from storage.convert import convert
from storage.store import Store
from workers.compute.blocks import run
from workers.compute.drafts.lookup import Lookup
from workers.compute.drafts.source import Source
from workers.compute.drafts.worth import Worth
from workers.compute.engine import Engine
from workers.compute.sampling import candidates

# -- rows -----------------------------------------------------------------------------------------

MODELS = ["opt", "opt-projected", "opt-post-norm", "falcon-7b", "falcon-rw", "falcon-40b", "qwen3", "gemma3"]


def made(base: Path, variant: str, **how: Any) -> Store:
    dtype = "bfloat16" if "bits" in how or variant == "llama" else "float32"
    changes = {"intermediate_size": 256} if "bits" in how else {}
    checkpoint = write_checkpoint(base / "checkpoint", variant, dtype, changes=changes)
    return convert(checkpoint, base / "store", name=variant, **how)


def published(base: Path) -> Store:
    """A GGUF file of four bits, 64 neurons a unit."""
    checkpoint = write_checkpoint(base / "checkpoint", "llama", changes={"intermediate_size": 256})
    return convert(of_checkpoint(checkpoint, base / "m.gguf", matrices="Q4_1"), base / "store", name="gguf")


def logits_of_rows(decoder: LocalDecoder, tokens: Sequence[int]) -> np.ndarray:
    """Of one step with all tokens, [tokens, vocabulary]; the decoder's length stays."""
    decoder.device.begin(decoder.length, len(tokens), every=False)
    x = run(decoder.architecture, decoder.device, decoder.device.embed(np.array(tokens)), decoder)
    return np.concatenate([decoder.device.logits(x[row : row + 1]) for row in range(len(tokens))])


def check_rows(store: Store) -> None:
    """A step of eight tokens, behind one whose drafts were wrong, has the bits of eight steps."""
    with LocalDecoder(store) as decoder:
        decoder.prefill(PROMPT)
        expected = np.stack([decoder.step(token) for token in range(20, 20 + STEP_ROWS)])
        decoder.prefill(PROMPT)
        first = logits_of_rows(decoder, [20, 99, 98])  # of which nothing stays but the first row
        rows = logits_of_rows(decoder, range(20, 20 + STEP_ROWS))
    assert np.array_equal(first[0], expected[0])
    assert np.array_equal(rows, expected)
    assert not np.array_equal(rows[0], rows[1])


ROWS = pytest.mark.kernels("torch's bits of a row hang on how many rows there are")


@ROWS
@pytest.mark.parametrize("variant", MODELS)
def test_a_row_has_the_bits_that_it_has_alone(tmp_path: Path, variant: str) -> None:
    assert variant in {**VARIANTS, **GATED}
    check_rows(made(tmp_path, variant))


@ROWS
@pytest.mark.parametrize("bits", [8, 4])
def test_so_it_has_in_few_bits(tmp_path: Path, bits: int) -> None:
    check_rows(made(tmp_path, "llama", bits=bits))


@ROWS
def test_so_it_has_in_a_published_file(tmp_path: Path) -> None:
    check_rows(published(tmp_path))


# -- one text -------------------------------------------------------------------------------------


class Always(Worth):
    """Verifies all there are."""

    def count(self, trust: int, room: int) -> int:
        return max(0, min(self._most, room)) if trust else 0

    def took(self, trust: int, drafted: int, accepted: int, seconds: float) -> None:
        """Nothing is learned."""


class Knowing:
    """A source that knows the text; every `wrong`-th draft is another token."""

    def __init__(self, answer: Sequence[int], wrong: int) -> None:
        self._answer, self._wrong, self._said = answer, wrong, 0

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> None:
        pass

    def trust(self, text: Sequence[int]) -> int:
        return 1

    def draft(self, text: Sequence[int], count: int, index: int) -> list[int]:
        found = []
        for token in self._answer[index : index + count]:
            self._said += 1
            found.append(token if self._said % self._wrong else (token + 1) % 50)
        return found

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", params=["falcon-7b", "llama", "gguf", "opt"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """GELU, gated SiLU, a GGUF file of four bits, and a ReLU model with all of its neurons."""
    base = tmp_path_factory.mktemp(request.param)
    return published(base) if request.param == "gguf" else made(base, request.param)


SAMPLED = {"temperature": 1.2, "top_p": 0.9, "seed": 7}


def written(fake: FakeRing) -> tuple[list[int], list[float]]:
    return fake.tokens, fake.logprobs


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("wrong", [2, 3, 10_000])
def test_drafts_change_no_token_and_no_probability(
    store: Store, tmp_path: Path, sampling: dict[str, Any], wrong: int
) -> None:
    count = 30
    with ring(store, tmp_path / "a", kind="all", spare=1) as fake:
        generate(fake, count=count, **sampling)
        expected = written(fake)
        assert fake.engine is not None
        assert (fake.engine.counts["steps"], fake.engine.counts["drafted"]) == (count - 1, 0)
    source = Knowing(expected[0], wrong)
    with ring(store, tmp_path / "b", kind="all", spare=1, drafts=source) as fake:
        assert fake.engine is not None
        fake.engine._worth = Always(4)
        assert generate(fake, count=count, **sampling).reason == "length"
        assert written(fake) == expected
        counts = fake.engine.counts
        assert counts["steps"] + counts["accepted"] == count - 1, "every step brings a token more than drafts"
        assert counts["drafted"] >= counts["accepted"] > 0
        assert (counts["drafted"] > counts["accepted"]) == (wrong < 10_000)
        assert max(one.step.count for one in fake.announced if not one.step.every) == 5
        assert {one.step.every for one in fake.announced[fake.plan.layers + 1 :]} == {False}


def test_what_the_text_repeats_is_found_and_verified(store: Store, tmp_path: Path) -> None:
    """By the real source and the real rule; the tokens are given, so that there is something to copy."""
    passage = tuple(range(30, 42))
    forced = (*passage, 50, *passage)
    with ring(store, tmp_path / "a", kind="all", spare=1) as fake:
        generate(fake, count=len(forced), forced=forced)
        expected = written(fake)
    with ring(store, tmp_path / "b", kind="all", spare=1, drafts=Lookup()) as fake:
        assert fake.engine is not None
        generate(fake, count=len(forced), forced=forced)
        assert fake.engine.counts["drafted"] == 0, "given tokens are measured one by one"
        assert written(fake) == expected
        fake.engine._even_forced, fake.engine._worth = True, Always(4)
        generate(fake, run=2, count=len(forced), forced=forced)
        assert written(fake) == expected
        assert fake.engine.counts["accepted"] >= 8


# -- ends of a run --------------------------------------------------------------------------------


@dataclass
class Chain:
    """A device whose next token hangs on the last alone: the smallest model there is."""

    table: np.ndarray  # logits [vocabulary, vocabulary]
    rows: int = STEP_ROWS

    def begin(self, first: int, count: int, every: bool, sequences: int = 1) -> None:
        assert every or count <= self.rows
        self.steps.append((first, count))

    def __post_init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(tokens)[:, None]

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.table[x[:, 0]].copy()


@dataclass
class Said:
    """A channel that keeps what is sent, and cancels a run at a token."""

    cancel_at: int = -1

    def __post_init__(self) -> None:
        self.messages: list[Message] = []
        self.engine: Engine | None = None

    def send(self, to: str, message: Message) -> None:
        self.messages.append(message)
        if isinstance(message, TokenReady) and message.index == self.cancel_at:
            assert self.engine is not None
            self.engine.cancel(Cancel(message.run))

    @property
    def tokens(self) -> list[int]:
        return [one.token for one in self.messages if isinstance(one, TokenReady)]

    @property
    def reason(self) -> str:
        assert isinstance(self.messages[-1], Finished)
        return self.messages[-1].reason


class Form:
    """A constraint: only even tokens, and whole after some."""

    def __init__(self, whole: int) -> None:
        self._whole, self.taken = whole, list[int]()

    def of(self, grammar: str, end_tokens: Sequence[int]) -> Form:
        return self

    def allowed(self) -> np.ndarray:
        return np.arange(0, 6, 2)

    def take(self, token: int) -> bool:
        self.taken.append(token)
        return len(self.taken) == self._whole


def chain(
    table: np.ndarray,
    source: Source | None,
    context: int = 10_000,
    cancel_at: int = -1,
    form: Form | None = None,
    **changes: Any,
) -> tuple[Said, Chain, Engine]:
    """One generation of the chain behind token 0."""
    nothing = architecture(1, 8, 8)
    model = replace(nothing, layers=())
    plan = Plan(8, (), 1, (), 1, context, 1, Forecast("all", 1, refine=False), drafts=4)
    device, said = Chain(table), Said(cancel_at)
    engine = Engine(model, device, plan, None, said, constraints=form, drafts=source)  # type: ignore[arg-type]
    engine._worth = Always(4)
    said.engine = engine
    values: dict[str, Any] = {
        "max_new_tokens": 40,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 3,
        "stop_tokens": (),
        "forced": (),
        **changes,
    }
    engine.generate(Generate(run=1, prompt=(0,), **values))
    return said, device, engine


RING = np.where(np.eye(6, k=1) + np.eye(6, k=-5) > 0, 4.0, 0.0).astype(np.float32)  # 0 1 2 3 4 5 0 …


@pytest.fixture
def loose() -> np.ndarray:
    """Logits between which there is something to choose."""
    return np.random.default_rng(5).normal(0, 1.5, (6, 6)).astype(np.float32)


@pytest.mark.parametrize("at", range(8, 14))
def test_a_stop_token_ends_a_run_wherever_it_is_among_drafts(at: int) -> None:
    table = np.pad(RING, ((0, 8), (0, 8)))
    answer = [1, 2, 3, 4, 5, 0] * 3
    source = Knowing([*answer[:at], 9], 10_000)  # which even foresees the stop
    free, _, _ = chain(table, None, temperature=0.0)
    assert free.tokens[: len(answer)] == answer
    said, _, engine = chain(table, source, temperature=0.0, stop_tokens=(9,), forced=())
    assert said.tokens == free.tokens
    said, _, engine = chain(table, Knowing(answer, 10_000), temperature=0.0, stop_tokens=(answer[at],))
    assert (said.tokens, said.reason) == (answer[: answer.index(answer[at])], "stop")
    assert engine.counts["steps"] + engine.counts["accepted"] >= len(said.tokens)


def test_no_step_goes_beyond_the_tokens_asked_for_or_the_context() -> None:
    answer = [1, 2, 3, 4, 5, 0] * 8
    for most in range(1, 14):
        said, device, engine = chain(RING, Knowing(answer, 10_000), temperature=0.0, max_new_tokens=most)
        assert (said.tokens, said.reason) == (answer[:most], "length")
        assert engine.counts["steps"] + engine.counts["accepted"] == most - 1
        assert max(first + count for first, count in device.steps) <= max(1, most)
    for context in range(2, 12):
        said, device, _ = chain(RING, Knowing(answer, 10_000), context, temperature=0.0)
        alone, _, _ = chain(RING, None, context, temperature=0.0)
        assert (said.tokens, said.reason) == (alone.tokens, alone.reason)
        assert max(first + count for first, count in device.steps) <= context


def test_a_cancelled_run_ends_in_mid_step() -> None:
    answer = [1, 2, 3, 4, 5, 0] * 8
    for at in range(10):
        said, _, engine = chain(RING, Knowing(answer, 10_000), cancel_at=at, temperature=0.0)
        assert (said.tokens, said.reason) == (answer[: at + 1], "cancelled")
        assert engine.counts["steps"] + engine.counts["accepted"] >= at


def test_a_grammar_takes_what_was_chosen_and_no_drafts(loose: np.ndarray) -> None:
    alone, freely = Form(25), Form(25)
    expected, _, _ = chain(loose, None, form=alone, grammar="even")
    said, _, engine = chain(loose, Lookup(), form=freely, grammar="even")
    assert (said.tokens, said.reason) == (expected.tokens, "stop")
    assert freely.taken == alone.taken == said.tokens
    assert {token % 2 for token in said.tokens} == {0}
    assert engine.counts["drafted"] > engine.counts["accepted"] > 0


def test_a_device_of_one_row_gets_no_drafts() -> None:
    class One(Chain):
        rows = 1

    nothing = replace(architecture(1, 8, 8), layers=())
    plan = Plan(8, (), 1, (), 1, 100, 1, Forecast("all", 1, refine=False), drafts=4)
    said = Said()
    engine = Engine(nothing, One(RING, 1), plan, None, said, drafts=Lookup())  # type: ignore[arg-type]
    engine.generate(Generate(1, (0,), 30, 0.0, 0, 1.0, 0, (), ()))
    assert (len(said.tokens), engine.counts["drafted"]) == (30, 0)


# -- distribution ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}], ids=str)
def test_sampled_tokens_have_the_models_distribution(loose: np.ndarray, limits: dict[str, Any]) -> None:
    """Of 20,000 tokens, of which many were drafted, those behind each token are as its logits say.

    The bound is chi-square's 99.9th percentile for the degrees of freedom there are, by Wilson and Hilferty.
    """
    said, _, engine = chain(loose, Lookup(), context=30_000, max_new_tokens=20_000, **limits)
    assert engine.counts["accepted"] > 4_000
    assert engine.counts["drafted"] - engine.counts["accepted"] > 4_000
    text = np.array([0, *said.tokens])
    found = np.zeros((6, 6))
    np.add.at(found, (text[:-1], text[1:]), 1)
    sampling = Sampling(limits.get("temperature", 1.0), limits.get("top_k", 0), limits.get("top_p", 1.0))
    square, freedom = 0.0, 0
    for token in range(6):
        order, chances = candidates(loose[token], sampling)
        expected = np.zeros(6)
        expected[order] = chances * found[token].sum()
        assert not found[token][expected == 0].any()
        likely = expected > 5
        square += float(((found[token] - expected)[likely] ** 2 / expected[likely]).sum())
        freedom += int(np.count_nonzero(likely)) - 1
    assert freedom >= 6
    spread = 2 / (9 * freedom)
    assert square < freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3
    alone, _, _ = chain(loose, None, context=30_000, max_new_tokens=20_000, **limits)
    assert alone.tokens == said.tokens, "a seed has one text"


# -- the ring -------------------------------------------------------------------------------------


@ROWS
@pytest.mark.ring
def test_the_ring_writes_the_same_with_drafts(tmp_path: Path) -> None:
    """A GELU model that streams three quarters of its neurons."""
    store = made(tmp_path, "falcon-7b")
    prompt, passage = [2, *(17, 40, 9, 77, 31) * 4], (60, 61, 62, 63, 64, 65, 66, 67)
    # A passage first: as soon as steps were measured, the first drafts are tried whatever the machine.
    hows: list[dict[str, Any]] = [{"forced": passage * 3}, {}, {"temperature": 0.8, "seed": 11}]
    found = []
    for kind in ("off", "lookup", "model"):  # its own model, which is right at all times
        drafts = {"kind": kind, "length": 5, "model": str(store.path)}
        chosen = config(predictor={"kind": "all", "refine": False}, drafts=drafts)
        with Session(store, chosen, plan_for(store, chosen)) as session:
            found.append([(in_ring(session, 24, prompt, **how), session.summary()) for how in hows])
    for (expected, alone), (text, together) in zip(found[0] * 2, found[1] + found[2], strict=True):
        assert text == expected
        assert (alone.drafts.steps, alone.drafts.drafted, alone.drafts.accepted) == (23, 0, 0)
        assert together.drafts.steps + together.drafts.accepted == 23
        assert together.to_json()["drafts"]["steps"] == together.drafts.steps
        share = together.drafts.steps / alone.drafts.steps
        assert together.flash.bytes_per_token == pytest.approx(share * alone.flash.bytes_per_token)
    assert found[1][0][1].drafts.accepted > 0, "the passage was copied"
    assert found[2][0][1].drafts.drafted > 0, "the model was asked"
