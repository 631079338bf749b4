"""What a generation cost, as a record and as `--json` prints it; and the counters that it is made of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from ring import config

from pipeline.commands.generate import describe
from pipeline.ring.audit import AuditReport, AuditSums
from pipeline.ring.counters import layer_and_name, of_layer
from pipeline.ring.generation import Generation
from pipeline.ring.messages import Finished
from pipeline.ring.plan import Forecast, Plan
from pipeline.ring.summary import MemoryUse, Summary

PLAN = Plan(
    d_model=16,
    units=(32, 32),
    stride=512,
    slots=(10, 12),
    staging=4,
    context=64,
    hidden_rows=4,
    forecast=Forecast("all", 1, refine=False),
)
AUDITED = AuditSums(
    tokens=2, active=8, missed=2, wrong=6, inactive=24, magnitude=4, magnitude_missed=1, output=9, error=1
)


def generation() -> Generation:
    before = {
        "cache": {"decode_hits": 1.0, "decode_misses": 1.0, "layer.0.hits": 1.0},
        "prefetcher": {"decode_bytes": 100.0, "decode_reads": 2.0},
        "compute": {"tokens": 5.0, "steps": 4.0},
    }
    after = {
        "cache": {"decode_hits": 31.0, "decode_misses": 11.0, "layer.0.hits": 31.0},
        "prefetcher": {
            "decode_bytes": 2100.0,
            "decode_reads": 6.0,
            "decode_gap_bytes": 50.0,
            "stream_bytes": 512.0,
            "stream_reads": 1.0,
        },
        "compute": {
            "tokens": 8.0,
            "steps": 6.0,
            "drafted": 3.0,
            "accepted": 1.0,
            "audit_seconds": 0.5,
            **dict(AUDITED.by_counter(1)),
        },
    }
    return Generation(
        prompt=(2, 3),
        tokens=[7, 8, 9],
        logprobs=[-1.0] * 3,
        moments=[1.0, 1.25, 1.75],
        text="abc",
        finished=Finished(1, "length", 0.25, 0.5),
        before=before,
        after=after,
    )


def summary(
    done: Generation, audit: int = 0, budget: int | None = 4096, lossy: tuple[str, ...] = ()
) -> Summary:
    return Summary.of(
        done,
        PLAN,
        config(compute={"audit": audit}),
        load_seconds=1.5,
        memory=MemoryUse(budget, 3000),
        pids={"compute": 11, "cache": 12},
        notes=["prefetcher: io_uring"],
        lossy=lossy,
    )


def test_the_json_has_its_keys_in_their_order():
    told = summary(generation()).to_json()
    wanted = {
        "text": "abc",
        "prompt_tokens": 2,
        "generated_tokens": 3,
        "finish_reason": "length",
        "seconds": {"load": 1.5, "prefill": 0.25, "decode": 0.5},
        "token_seconds": [0.25, 0.5],
        "tokens_per_second": 4.0,
        "flash": {
            "bytes_read": 2512,
            "reads": 5,
            "bytes_per_token": 1000.0,
            "prefill_bytes": 512,
            "gap_bytes": 50,
        },
        "cache": {"slots": 22, "hits": 30, "misses": 10, "hit_rate": 0.75},
        "drafts": {"steps": 2, "drafted": 3, "accepted": 1},
        "memory": {"budget_bytes": 4096, "peak_bytes": 3000},
        "workers": [{"name": "compute", "pid": 11}, {"name": "cache", "pid": 12}],
        "audit": None,
        "counters": {
            "cache": {"decode_hits": 30.0, "decode_misses": 10.0},
            "prefetcher": {
                "decode_bytes": 2000.0,
                "decode_reads": 4.0,
                "decode_gap_bytes": 50.0,
                "stream_bytes": 512.0,
                "stream_reads": 1.0,
            },
            "compute": {"tokens": 3.0, "steps": 2.0, "drafted": 3.0, "accepted": 1.0, "audit_seconds": 0.5},
        },
        "notes": ["prefetcher: io_uring"],
        "lossy": [],
        "config": config(compute={"audit": 0}).model_dump(mode="json"),
    }
    assert json.dumps(told) == json.dumps(wanted)


def test_an_audited_run_tells_its_shares_by_layer():
    shares = {
        "tokens": 2,
        "active": 0.25,
        "false_negatives": 0.25,
        "false_positives": 0.25,
        "weighted_recall": 0.75,
        "output_error": pytest.approx(1 / 3),
    }
    told = summary(generation(), audit=4)
    assert told.audit is not None
    wanted = {**shares, "seconds": 0.5, "layers": [{"layer": 1, **shares}]}
    assert told.to_json()["audit"] == wanted
    assert list(told.to_json()["audit"]) == list(wanted)
    assert told.audit.describe().startswith("[audit of 2 layers: 25.0% of the active neurons missed")


def test_nothing_that_was_not_counted_divides_by_zero():
    short = replace(generation(), tokens=[7], moments=[1.0], after=generation().before)
    told = summary(short, budget=None)
    assert (told.tokens_per_second, told.token_seconds, told.cache.hit_rate) == (0.0, (), 0.0)
    assert told.memory.budget_bytes is None
    assert "no lookups" in describe(told)


def test_the_one_line_of_a_run():
    assert describe(summary(generation())) == (
        "[3 tokens, 4.0 tokens/s, 0.00 MB read per token, hit rate 75.0 %, peak memory 2.93 KiB, "
        "1 of 3 drafts accepted]"
    )
    dials = ("3 of 4 experts", "another")
    assert summary(generation(), lossy=dials).to_json()["lossy"] == list(dials)
    assert describe(summary(generation(), lossy=dials)).endswith("accepted, lossy: 3 of 4 experts, another]")


@pytest.mark.parametrize("layer", [0, 7, 119])
def test_a_layers_counter_is_taken_apart_as_it_was_built(layer):
    assert layer_and_name(of_layer(layer, "audit_missed")) == (layer, "audit_missed")


@pytest.mark.parametrize("name", ["decode_hits", "layer.", "layer.x.hits", "layer.1", "layers.1.hits"])
def test_other_counters_belong_to_no_layer(name):
    assert layer_and_name(name) is None


def test_layers_that_were_not_audited_are_left_out():
    assert AuditReport.of(lambda worker, name: 0.0, 3).layers == {}
