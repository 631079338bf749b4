"""Evaluation: formats, statistics, scores against plain forward passes and against the ring itself."""

from __future__ import annotations

import bz2
import json
import lzma
import math
from functools import partial
from pathlib import Path

import numpy as np
import predictors
import pytest
import torch
from checkpoints import write_checkpoint
from ring import config, plan_for
from ring import generate as decode
from safetensors.numpy import load_file

from pipeline import cli
from pipeline.config import Cache
from pipeline.ring.messages import EMBEDDING, NeuronsPredicted, Step
from pipeline.ring.segments import ID
from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import ConfigError, UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer
from workers.cache.layers import LayerCache
from workers.cache.policies import make_policy
from workers.lab.evaluation import __main__ as evaluation
from workers.lab.evaluation import evaluate, points
from workers.lab.evaluation.report import compare_task, compare_text, judge
from workers.lab.evaluation.statistics import paired_difference, proportion, ratio_of_perplexities
from workers.lab.evaluation.tasks import Item, find, load
from workers.lab.offline import scoring
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel
from workers.lab.offline.scoring import Scored, batches, score

LENGTH = 126  # tokens of a sequence, within the context of 128


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small random ReLU model whose predictors choose about half of the neurons, at random."""
    base = tmp_path_factory.mktemp("evaluation")
    made = convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="small")
    layers = range(len(made.layout.layers))
    tensors = predictors.maps(made, "layers", layers, seed=1) | predictors.maps(
        made, "inlayer", layers, seed=2
    )
    predictors.write(made, tensors)
    predictors.write(made, tensors, "early", {"early": "true"})
    return made


@pytest.fixture
def model(store):
    with DenseModel(store, 1) as dense, torch.no_grad():
        yield dense


def sequences(count: int, length: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(4, 260, (count, length)).tolist()


# -- items ----------------------------------------------------------------------------------------


def test_hellaswag_has_six_lines_an_item(tmp_path):
    path = tmp_path / "hellaswag_small.txt.bz2"
    path.write_bytes(bz2.compress(b"A man sits.\n2\nruns.\nswims.\nstays.\nflies.\n"))
    assert load("hellaswag", path) == [Item("A man sits.", (" runs.", " swims.", " stays.", " flies."), 2)]


def test_questions_are_asked_as_the_harness_does(tmp_path):
    path = tmp_path / "arc_easy.jsonl.xz"
    record = {"query": "Question: What is wet? ", "choices": ["water", "sand"], "gold": 0}
    path.write_bytes(lzma.compress((json.dumps(record) + "\n").encode()))
    wanted = Item("Question: What is wet?\nAnswer:", (" water", " sand"), 0)
    assert load("arc_easy", find("arc_easy", tmp_path)) == [wanted]


def test_lambada_is_one_continuation(tmp_path):
    path = tmp_path / "lambada.jsonl"
    path.write_text(json.dumps({"context": "some sort of \n", "continuation": " signs"}), encoding="utf-8")
    assert load("lambada", path) == [Item("some sort of", (" signs",), 0)]


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        ("hellaswag", "a\n1\nb\n", "not a multiple of six"),
        ("piqa", '{"query": "a", "choices": ["b"]}', "not a piqa file: item 1 has no 'gold'"),
        ("piqa", '{"query": "a", "choices": ["b"], "gold": 1}', "out of range"),
        ("piqa", "[1]", "not a piqa file"),
        ("sudoku", "", "unknown task"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, task, text, reason):
    path = tmp_path / "items"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=reason):
        load(task, path)


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="no file for the task piqa"):
        find("piqa", tmp_path)


# -- statistics -----------------------------------------------------------------------------------


def test_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    found = proportion(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    none = proportion(0, 20)
    assert (none.low, round(none.high, 4)) == (0.0, 0.1611)


def test_paired_difference_of_known_items():
    first = np.array([True] * 60 + [False] * 40)
    second = np.array([True] * 50 + [False] * 50)
    found = paired_difference(first, second)
    half = 1.959964 * math.sqrt(0.1 * 0.9 / 99)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1 - half), pytest.approx(0.1 + half))
    assert paired_difference(first, first).high == 0.0


def test_perplexity_ratio_and_its_bootstrap():
    generator = np.random.default_rng(3)
    tokens = np.full(400, 100)
    dense = generator.normal(250.0, 20.0, 400)
    shift = generator.normal(1.0, 0.5, 400)  # nats a chunk: 0.01 ± 0.005 a token
    found = ratio_of_perplexities(dense + shift, dense, tokens, seed=0)
    assert found.value == pytest.approx(math.exp(shift.mean() / 100))
    error = 0.5 / math.sqrt(400) / 100
    assert math.log(found.high / found.low) == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.low < found.value < found.high


def test_one_sample_has_no_interval():
    found = ratio_of_perplexities(np.array([3.0]), np.array([2.0]), np.array([10]), seed=0)
    assert (found.value, found.low, found.high) == (pytest.approx(math.exp(0.1)), None, None)
    assert found.beyond(1).percent() == "10.52% (one sample: no interval)"
    assert paired_difference(np.array([True]), np.array([False])).low is None


def test_reports_of_known_scores():
    dense = [Scored(np.log([0.5, 0.25]), np.array([1, 2])), Scored(np.log([0.125]), np.array([3]))]
    sparse = [Scored(np.log([0.5, 0.125]), np.array([1, 5])), Scored(np.log([0.125]), np.array([3]))]
    found = compare_text(dense, sparse, text_bytes=12, seed=0)
    assert found.dense_perplexity == pytest.approx(4.0)
    assert found.ratio.value == pytest.approx(2 ** (1 / 3))
    assert found.agreement.value == pytest.approx(2 / 3)
    assert found.dense_nats_per_byte == pytest.approx(3 * math.log(4) / 12)


def test_answers_are_judged_plain_and_by_length():
    items = [Item("q", ("a", "bbbb"), 1), Item("q", ("a", "bb"), 0)]
    scored = [[(-2.0, False), (-4.0, False)], [(-1.0, False), (-3.0, False)]]
    judged = judge(items, scored)
    assert (judged.plain.tolist(), judged.normalised.tolist()) == ([False, True], [True, True])
    greedy = judge([Item("q", ("a",), 0)] * 2, [[(-9.0, True)], [(-0.1, False)]])
    assert (greedy.plain.tolist(), greedy.normalised) == ([True, False], None)
    assert compare_task("x", judged, judged).difference.value == 0.0


# -- scores ---------------------------------------------------------------------------------------


def test_scoring_in_batches_equals_one_sequence_at_a_time(model, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", 60)
    some = [one[:length] for one, length in zip(sequences(6, 40), [40, 3, 17, 40, 2, 9], strict=True)]
    for one, found in zip(some, score(model, some, None), strict=True):
        wanted = torch.log_softmax(model.forward([one])[0, :-1].double(), dim=-1)
        picked = wanted[torch.arange(len(one) - 1), torch.tensor(one[1:])]
        np.testing.assert_allclose(found.logprobs, picked.numpy(), atol=1e-5)
        assert (found.likeliest == wanted.argmax(dim=-1).numpy()).all()


def test_batches_hold_every_sequence_once(monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", 100)
    lengths = [50, 10, 99, 120, 7, 50, 50]
    found = list(batches(lengths))
    assert sorted(i for group in found for i in group) == list(range(7))
    assert all(len(group) * max(lengths[i] for i in group) <= 100 or len(group) == 1 for group in found)


@pytest.mark.parametrize(
    ("lookahead", "refine", "wanted"),
    [
        (0, False, [0, 1, 2]),
        (1, True, [0, 1, 2]),
        (1, False, [EMBEDDING, 0, 1]),
        (2, False, [EMBEDDING, EMBEDDING, 0]),
    ],
)
def test_sources_are_the_rings(store, lookahead, refine, wanted):
    if lookahead == 2:
        layers = range(len(store.layout.layers))
        predictors.write(store, predictors.maps(store, "layers", layers), "two", {"lookahead": "2"})
    chosen = config(
        predictor={"kind": "lowrank", "lookahead": lookahead, "refine": refine},
        model={"predictor": "two" if lookahead == 2 else "default"},
    )
    chooser = make_chooser(store, chosen)
    assert [chooser.sources(layer) for layer in range(3)] == wanted


def test_kind_all_needs_no_chooser(store):
    assert make_chooser(store, config(predictor={"kind": "all", "refine": False})) is None


def test_oracle_scores_as_dense(store, model):
    some = sequences(3, 30)
    dense = score(model, some, None)
    oracle = score(model, some, make_chooser(store, config()))
    for a, b in zip(dense, oracle, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "count", "name"),
    [
        ({"lookahead": 1, "refine": True, "pinned_layers": (-1,)}, 16, "default"),
        ({"lookahead": 1, "refine": False, "threshold": -0.3}, 3, "default"),
        ({"lookahead": 0, "threshold": 0.3}, 3, "default"),
        ({"lookahead": 0, "threshold": 0.3}, 3, "early"),
    ],
    ids=str,
)
@pytest.mark.ring
def test_scores_equal_the_rings_own_decoding_over_2000_tokens(store, model, changes, count, name):
    """A neuron whose predicted score is within rounding of the threshold may fall either way: one in a
    million. So nearly all tokens agree to rounding, while the dense model agrees nowhere."""
    chosen = config(predictor={"kind": "lowrank", **changes}, model={"predictor": name})
    some = sequences(count, LENGTH + 1)
    decoded = []
    with Session(store, chosen, plan_for(store, chosen)) as session:
        for one in some:
            decoded.append(decode(session, LENGTH, one[:1], forced=tuple(one[1:])).logprobs)
    found = score(model, some, make_chooser(store, chosen))
    dense = score(model, some, None)
    ring = np.array(decoded)[:, 1:]  # the first comes out of the prefill
    assert ring.size == count * (LENGTH - 1)
    apart = np.abs(ring - np.array([one.logprobs for one in found])[:, 1:])
    assert np.quantile(apart, 0.99) < 1e-4
    from_dense = np.abs(ring - np.array([one.logprobs for one in dense])[:, 1:])
    assert np.quantile(from_dense, 0.05) > 1e-3


@pytest.mark.parametrize("lookahead", [0, 1])
def test_cache_aware_choice_is_the_rings_caches(store, lookahead):
    """Token after token, the chosen sets are those that the ring's own cache makes of the same scores."""
    tensors = load_file(store.predictors("default"))
    for layer in range(3):
        tensors[f"inlayer.{layer}.resident"] = np.array([-0.4], np.float32)
        tensors[f"inlayer.{layer}.absent"] = np.array([0.6], np.float32)
    predictors.write(store, tensors, "aware")
    chosen = config(
        predictor={"kind": "lowrank", "lookahead": lookahead, "cache_aware": True},
        model={"predictor": "aware"},
        cache={"share": 0.5, "half_life": 4.0},
    )
    with pytest.raises(ConfigError, match="tokens in their order"):
        make_chooser(store, chosen)
    chooser = make_chooser(store, chosen, in_order=True)
    divided = plan_for(store, chosen)
    shape = (3, 2, divided.most_units)
    wanted = np.zeros(shape, np.int32)
    policy = partial(make_policy, divided.most_units, Cache(half_life=4.0))
    cache = LayerCache(divided, wanted, np.zeros(shape, np.int32), lambda layer: policy())
    source = torch.from_numpy(np.random.default_rng(4).normal(size=(40, store.architecture.d_model))).float()
    guessed = chooser.guess(1, source)
    found = torch.cat([chooser.choose(1, rows, some) for rows, some in blocks(source, guessed)])
    likely, sure = chooser.scores.graded(1, source, True)
    doubtful = 0
    for step in range(40):
        if guessed is not None:
            cache.handle(*asked(step, np.flatnonzero(guessed[step]), (), guess=True))
        certain, doubted = (np.flatnonzero(likely[step] & mask) for mask in (sure[step], ~sure[step]))
        *_, parts = cache.handle(*asked(step, certain, doubted, guess=False))
        computed = np.sort(wanted[1, ID, : sum(parts.counts)])
        assert computed.tolist() == np.flatnonzero(found[step]).tolist()
        doubtful += int((found[step] & ~sure[step]).sum())
    assert doubtful > 100


def blocks(source, guessed):
    for rows in (slice(0, 15), slice(15, 40)):
        yield source[rows], None if guessed is None else guessed[rows]


def asked(step: int, certain, doubtful, guess: bool) -> tuple[NeuronsPredicted, np.ndarray]:
    now = Step(step, step, 1, every=False)
    message = NeuronsPredicted(0, now, 1, guess, False, len(certain), len(doubtful), None, 3 * step - 1)
    return message, np.concatenate((certain, doubtful)).astype(np.int32)


def test_text_is_cut_into_chunks_with_the_prefix(store):
    tokenizer = load_tokenizer(store)
    found, size = evaluate.chunks(tokenizer, "abcdefghij", 5, None)
    assert [len(one) for one in found] == [5, 5, 3]
    assert {one[0] for one in found} == {2}
    assert size == 10
    assert evaluate.chunks(tokenizer, "abcdefghij", 5, 4)[1] == 4
    with pytest.raises(UsageError, match="too short"):
        evaluate.chunks(tokenizer, "", 5, None)


# -- the command ----------------------------------------------------------------------------------


def run(monkeypatch, *arguments: str) -> int:
    """In this process: to start one with torch takes two seconds."""
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    return evaluation.run()


def test_the_command(store, tmp_path, monkeypatch, capfd):
    (tmp_path / "text.txt").write_text("Once upon a time there was a small model. " * 8, encoding="utf-8")
    (tmp_path / "lambada.jsonl").write_text('{"context": "a b", "continuation": "c"}\n' * 3, encoding="utf-8")
    options = ("--model", str(store.path), "--threads", "1", "--limit", "2", "--json")
    files = ("--text", str(tmp_path / "text.txt"), "--tasks", "lambada", "--data", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["run.py", "evaluate", *options, *files])
    assert cli.main() == 0
    found = json.loads(capfd.readouterr().out)
    assert found["text"]["tokens"] > 300
    assert found["text"]["ratio"]["value"] != 1.0
    assert found["tasks"][0]["items"] == 2
    assert found["config"]["predictor"]["kind"] == "lowrank"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing to evaluate"),
        (("--tasks", "piqa"), "--data"),
        (("--tasks", "sudoku", "--data", "."), "unknown task"),
        (("--text", "missing.txt"), "missing.txt cannot be read: No such file or directory"),
        (("--point", "a: predictor.kind=all"), "give --text"),
        (("--point", "all", "--text", "a"), "--point takes"),
        (("--text", "a", "--tokens", "1"), "--tokens 1 is too few"),
        (("--text", "a", "--picture", "/nowhere/dial.png"), "there is no directory /nowhere"),
        (("--text", "a", "--picture", "dial.png"), "--picture shows points"),
        (("--text", "a", "--seed", "-1"), "greater than or equal to 0"),
        (("--text", "a", "--set", "compute.context=1"), "compute.context 1 is too little"),
        (
            ("--tasks", "piqa", "--data", ".", "--text", "a", "--point", "a: predictor.kind=all"),
            "points are compared on a text alone",
        ),
    ],
)
def test_wrong_use_is_one_sentence(store, monkeypatch, capfd, arguments, reason):
    assert run(monkeypatch, "--model", str(store.path), *arguments) == 2
    said = capfd.readouterr().err
    assert reason in said
    assert "Traceback" not in said


def test_points_compare_settings_on_one_text(store, tmp_path, monkeypatch, capfd):
    text, picture = tmp_path / "text.txt", tmp_path / "dial.png"
    text.write_text("Once upon a time there was a small model. " * 8, encoding="utf-8")
    points = ("--point", "whole: predictor.kind=all", "--point", "oracle: predictor.kind=oracle")
    options = ("--text", str(text), "--threads", "1", "--picture", str(picture), "--json")
    arguments = ("--model", str(store.path), "--thresholds=-1,1", *points, *options)
    assert run(monkeypatch, *arguments, "--set", "cache.share=0.6") == 0
    found = {one["name"]: one for one in json.loads(capfd.readouterr().out)["points"]}
    assert list(found) == ["whole", "oracle", "-1", "1"]
    assert found["whole"]["ratio"]["value"] == 1.0
    assert found["oracle"]["ratio"]["value"] == pytest.approx(1.0, abs=1e-5)
    assert found["oracle"]["false_negatives"] == 0.0
    assert found["1"]["predicted"] < found["-1"]["predicted"] < 1.0
    assert found["1"]["false_negatives"] > found["-1"]["false_negatives"] > 0.0
    assert found["1"]["bytes_per_token"] < found["-1"]["bytes_per_token"]
    layout = store.layout
    streamed = len(layout.layers) * (layout.most_units - round(0.6 * layout.most_units)) * layout.stride
    assert found["whole"]["bytes_per_token"] == streamed
    assert picture.stat().st_size > 10_000
    wrong = ("--point", "wrong: model.predictor=none")
    assert run(monkeypatch, *arguments, *wrong) == 2
    said = capfd.readouterr()
    assert (said.out, "no predictors named 'none'" in said.err) == ("", True)
    assert run(monkeypatch, *arguments, "--tokens", "100") == 0  # one row: no interval
    ratios = [one["ratio"] for one in json.loads(capfd.readouterr().out)["points"]]
    assert all(one["low"] is one["high"] is None for one in ratios)
    assert run(monkeypatch, *arguments[:-1], "--tokens", "100") == 0
    assert "+0.00%" in capfd.readouterr().out


def test_points_read_what_their_own_cache_would(store, model):
    rows = np.random.default_rng(5).integers(4, 260, (2, 40))

    def read(**sections):
        predictor = {"kind": "lowrank", "lookahead": 0, **sections.pop("predictor", {})}
        chosen = config(predictor=predictor, **sections)
        (found,) = points.measure(model, [("one", chosen, ())], rows, 0)
        return found

    share = {"cache": {"share": 0.6}}
    usual, forgetful = read(**share), read(cache={"share": 0.6, "keep": False})
    assert 0.0 == forgetful.hit_rate < usual.hit_rate
    whole = read(**share, predictor={"pinned_layers": (0, 1, 2)})  # all resident after the first tokens
    assert (whole.bytes_per_token, whole.capacity, whole.hit_rate) == (0.0, 1.0, 1.0)


def test_an_empty_task_file_and_a_damaged_one_are_named(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UsageError, match="is not a piqa file: it has no items"):
        load("piqa", tmp_path / "piqa.jsonl")
    (tmp_path / "piqa.jsonl.bz2").write_bytes(bz2.compress(b"x" * 1000)[:-20])
    with pytest.raises(UsageError, match=r"piqa\.jsonl\.bz2 cannot be read"):
        load("piqa", tmp_path / "piqa.jsonl.bz2")


def test_tasks_score_choices_by_their_tokens(store, model, tmp_path):
    path: Path = tmp_path / "piqa.jsonl"
    path.write_text('{"query": "Why?", "choices": ["yes", "no"], "gold": 1}\n', encoding="utf-8")
    tokenizer = load_tokenizer(store)
    ((first, second),) = evaluate.answer(model, None, tokenizer, load("piqa", path))
    whole = tokenizer.encode("Why?\nAnswer: yes").ids
    wanted = score(model, [whole], None)[0].logprobs[-4:].sum()
    assert first[0] == pytest.approx(wanted, abs=1e-5)
    assert second[0] != first[0]
