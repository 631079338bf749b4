"""The adapter of evaluation harnesses: its own logic always, inside lm-eval where that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import predictors
import pytest
import torch
from checkpoints import BOS, POSITIONS, reference_model, write_checkpoint
from ring import config, plan_for

from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.convert import convert
from storage.errors import UsageError
from storage.store import Store
from workers.lab.evaluation.harness import Harness, params

SETTINGS = ("compute.threads=1", "compute.context=128", "prefetcher.readers=1", "predictor.refine=false")
PAIRS = [("The cat sat on", " the mat"), ("One and one is", " two"), ("", "Why"), ("Who?", "")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("harness") / "checkpoint", "opt", "float32")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Store:
    """A small random ReLU model with random predictors, so that sparse and dense differ."""
    made = convert(checkpoint, checkpoint.with_name("store"), name="small")
    predictors.write(made, predictors.maps(made, "layers", range(len(made.layout.layers))))
    return made


@pytest.fixture
def dense(store):
    with Harness(str(store.path), SETTINGS, "exact", threads=1) as found:
        yield found


@pytest.fixture
def sparse(store):
    with Harness(str(store.path), SETTINGS, threads=1) as found:
        yield found


def reference(checkpoint: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """What transformers' own model makes of a pair."""
    tokens = (context + continuation)[-POSITIONS - 1 :]
    with torch.no_grad():
        logits = reference_model(checkpoint)(torch.tensor([tokens[:-1]])).logits[0]
    logprobs = torch.log_softmax(logits.double(), dim=-1)[-len(continuation) :]
    wanted = torch.tensor(continuation)
    greedy = bool((logprobs.argmax(dim=-1) == wanted).all())
    return float(logprobs.gather(1, wanted[:, None]).sum()), greedy


def test_dense_scores_are_those_of_transformers(checkpoint, dense):
    likeliest = dense.encode("ab")
    with torch.no_grad():
        greedy = int(reference_model(checkpoint)(torch.tensor([likeliest])).logits[0, -1].argmax())
    generator = np.random.default_rng(0)
    long = generator.integers(4, 260, POSITIONS + 40).tolist()
    pairs = [(dense.encode("The cat"), [40, 41, 42]), (likeliest, [greedy]), (long[:-5], long[-5:])]
    found = dense.score(pairs)
    for pair, (logprob, is_greedy) in zip(pairs, found, strict=True):
        wanted, greedily = reference(checkpoint, *pair)
        assert logprob == pytest.approx(wanted, abs=1e-3)
        assert is_greedy == greedily
    assert [one for _, one in found] == [False, True, False]


def test_nothing_to_say_is_certain(dense):
    assert dense.score([([BOS], []), ([BOS], [40])])[0] == (0.0, True)


def test_sparse_scores_apply_the_predicted_neurons(dense, sparse):
    pairs = [(dense.encode("The cat"), [40, 41, 42])]
    assert abs(sparse.score(pairs)[0][0] - dense.score(pairs)[0][0]) > 1e-3


@pytest.mark.ring
def test_texts_are_the_rings_up_to_the_stop(store, sparse):
    chosen = config(predictor={"kind": "lowrank", "refine": False})
    prompt = sparse.encode("Once")
    with Session(store, chosen, plan_for(store, chosen)) as session:
        whole = "".join(session.generate(prompt, GenerationParams(max_new_tokens=12)))
    stop = whole[5:7]
    keywords = {"max_gen_toks": 12, "until": [stop]}
    cut, long, free = sparse.write([("Once", keywords), ("x" * 300, keywords), ("Once", {"max_tokens": 12})])
    assert free == whole
    assert cut == whole[: whole.index(stop)]
    assert stop not in long
    with pytest.raises(UsageError, match="do not fit"):
        sparse.write([("Once", {"max_gen_toks": 128})])


@pytest.mark.parametrize(
    ("keywords", "temperature", "tokens", "stops"),
    [
        ({}, 0.0, 256, ()),
        ({"until": "\n", "max_tokens": 5}, 0.0, 5, ("\n",)),
        ({"do_sample": False, "temperature": 0.7, "until": ["a", "b"]}, 0.0, 256, ("a", "b")),
        ({"do_sample": True, "max_gen_toks": 3}, 1.0, 3, ()),
        ({"temperature": 0.5}, 0.5, 256, ()),
    ],
)
def test_keywords_say_how_to_decode(keywords, temperature, tokens, stops):
    found, until = params(keywords)
    assert (found.sampling.temperature, found.max_new_tokens, until) == (temperature, tokens, stops)
    found.check()


# -- inside the harness ------------------------------------------------------------------------------


def local_task(base: Path, name: str, **more: object) -> dict:
    """A task of the harness on a file of its own, without a network."""
    items = [{"q": "The cat sat on the", "options": [" mat", " sky", " song"], "gold": 0, "end": " mat"}]
    items += [{"q": f"{n} and one is", "options": [" two", " six", " ten"], "gold": 1} for n in range(5)]
    lines = [json.dumps({"end": " two", **item}) for item in items]
    (base / "items.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = {"data_files": {"test": str(base / "items.jsonl")}, "cache_dir": str(base / "cache")}
    data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{q}}"}
    data["target_delimiter"] = ""  # else a blank
    return {"task": name, **data, **more}


@pytest.mark.filterwarnings("ignore")  # the harness and its dependencies have many
def test_lm_eval_runs_local_tasks(store, tmp_path, dense, sparse):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from workers.lab.evaluation import lm_eval_model

    choices = {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "gold"}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}"}
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{end}}",
        "generation_kwargs": {"until": ["a"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    tasks = [
        local_task(tmp_path, "choices", **choices, metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}]),
        local_task(tmp_path, "rolling", **rolling, metric_list=[{"metric": "bits_per_byte"}]),
        local_task(tmp_path, "written", **written),
    ]
    for quality, harness in (("exact", dense), ("", sparse)):
        found = lm_eval.simple_evaluate(
            model="flashring",
            model_args={
                "model": str(store.path),
                "quality": quality,
                "settings": " ".join(SETTINGS),
                "threads": 1,
            },
            tasks=tasks,
            bootstrap_iters=0,
        )
        samples = {
            name: [one["filtered_resps"] for one in found["samples"][name]] for name in found["samples"]
        }
        items = [one["doc"] for one in found["samples"]["choices"]]
        assert len(items) == 6
        right = 0
        for item, answers in zip(items, samples["choices"], strict=True):
            start = harness.encode(item["q"])
            pairs = [(start, harness.encode(item["q"] + one)[len(start) :]) for one in item["options"]]
            wanted = [logprob for logprob, _ in harness.score(pairs)]
            assert [logprob for logprob, _ in answers] == pytest.approx(wanted, abs=1e-4)
            right += int(np.argmax(wanted)) == item["gold"]
        assert found["results"]["choices"]["acc,none"] == pytest.approx(right / 6)
        whole = [([BOS], harness.encode(item["q"], special=False)) for item in items]
        assert [one[0] if isinstance(one, list) else one for one in samples["rolling"]] == pytest.approx(
            [logprob for logprob, _ in harness.score(whole)], abs=1e-4
        )
        texts = harness.write([(item["q"], written["generation_kwargs"]) for item in items])
        assert [one[0] for one in samples["written"]] == texts
    assert lm_eval_model.FlashringLM.__name__ == "FlashringLM"
