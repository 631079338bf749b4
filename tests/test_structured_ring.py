"""Answers of a given form by real rings: the built-in model, the official client, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import HERMES
from jsonschema import Draft202012Validator
from serving import served
from test_http import speak

from pipeline import Client, Pipeline
from pipeline.config import Config
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.ring.session import Session
from storage.errors import UsageError
from storage.store import Store
from workers.lab.structured.measure import measure

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["big", "small"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
QUICK = ["compute.threads=1", "predictor.kind=all", "cache.share=1.0"]
VALID = Draft202012Validator(SCHEMA).is_valid
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}, "day": {"$ref": "#/$defs/day"}},
            "required": ["city", "day"],
            "additionalProperties": False,
            "$defs": {"day": {"enum": ["today", "tomorrow"]}},
        },
    },
}
pytestmark = pytest.mark.ring


@pytest.fixture(scope="module")
def builtin() -> tuple[Store, Config]:
    source, config = configure("builtin", None, QUICK, {"compute": {"structured": True}})
    return source.open_store(), config


@pytest.fixture
def session(builtin: tuple[Store, Config]) -> Iterator[Session]:
    store, config = builtin
    with Session(store, config, plan(store, config).plan) as session:
        yield session


def test_every_answer_of_the_built_in_model_follows_its_schema(session: Session) -> None:
    """One of each of the ten; `bench-structured` gives two hundred."""
    said: list[str] = []
    result = measure(session, answers=10, temperature=1.0, max_new_tokens=400, seed=1, say=said.append)
    assert (result["valid"], result["cut"], said) == (10, 0, [])
    assert [one["answers"] for one in result["questions"].values()] == [1] * 10


def test_a_seed_gives_the_same_text_and_a_limit_cuts_it() -> None:
    with Pipeline.open(settings=QUICK) as ring:

        def ask(seed: int, limit: int = 300) -> tuple[str, str]:
            answer = ring.generate(
                "A bear", json_schema=SCHEMA, temperature=1.0, seed=seed, max_new_tokens=limit
            )
            text = answer.read()
            assert answer.done is not None
            return text, answer.done.reason

        first = [ask(seed) for seed in range(2)]
        assert all(VALID(json.loads(text)) and reason == "stop" for text, reason in first)
        assert len({*first}) > 1
        assert ring.generate("A bear", max_new_tokens=8, temperature=0.0).read().strip().isascii()
        assert ask(1) == first[1]
        text, reason = ask(0, limit=3)
        assert reason == "length"
        assert first[0][0].startswith(text)
        greedy = ring.generate("A bear", json_schema=SCHEMA, temperature=0.0).read()
        assert VALID(json.loads(greedy))


def test_without_memory_for_it_a_schema_is_refused() -> None:
    with (
        Pipeline.open(settings=[*QUICK, "compute.structured=false"]) as ring,
        pytest.raises(UsageError, match=r"compute\.structured"),
    ):
        ring.generate("A bear", json_schema=SCHEMA).read()


def test_the_official_clients_round_trip(builtin: tuple[Store, Config], tmp_path: Path) -> None:
    store, config = builtin
    template, asked = HERMES, [{"role": "user", "content": "What is the weather in Rome?"}]

    def open_session() -> Session:
        return Session(store, config, plan(store, config).plan)

    with served(tmp_path, open_session, http={}, template=template) as server, speak(server.url) as client:
        options: dict[str, Any] = {"model": "fake", "tools": [WEATHER], "temperature": 1.0, "max_tokens": 300}
        first = client.chat.completions.create(
            messages=asked, tool_choice="required", parallel_tool_calls=False, seed=1, **options
        ).choices[0]
        assert first.finish_reason == "tool_calls"
        (called,) = first.message.tool_calls
        Draft202012Validator(WEATHER["function"]["parameters"]).validate(
            json.loads(called.function.arguments)
        )
        stream = client.chat.completions.create(
            messages=asked,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            seed=1,
            stream=True,
            **options,
        )
        deltas = [part.choices[0].delta for part in stream]
        (streamed,) = [one for delta in deltas for one in delta.tool_calls or []]
        assert streamed.function.arguments == called.function.arguments
        result = {"role": "tool", "tool_call_id": called.id, "content": "It is sunny."}
        second = client.chat.completions.create(
            messages=[*asked, first.message, result], seed=1, **options | {"max_tokens": 8}
        )
        assert second.choices[0].message.content
        assert second.choices[0].finish_reason == "length"
        wanted = {"type": "json_schema", "json_schema": {"name": "bear", "schema": SCHEMA, "strict": True}}
        answer = client.chat.completions.create(
            model="fake", messages=asked, response_format=wanted, temperature=1.0, seed=4
        ).choices[0]
        assert VALID(json.loads(answer.message.content))
        cut = client.chat.completions.create(
            model="fake", messages=asked, response_format=wanted, max_tokens=2, seed=4
        ).choices[0]
        assert cut.finish_reason == "length"
        with Client(server.endpoint) as other:
            assert VALID(json.loads(other.generate("A bear", json_schema=SCHEMA, temperature=1.0).read()))


def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=200, check=False)


def test_the_command_line_writes_json_of_a_schema(tmp_path: Path) -> None:
    file, bad = tmp_path / "schema.json", tmp_path / "bad.json"
    file.write_text(json.dumps(SCHEMA))
    bad.write_text('{"enum": []}')
    (tmp_path / "template.jinja").write_text(HERMES)
    done = run("--prompt", "A bear", "--json-schema", str(file), "--temperature", "1", "-v")
    assert done.returncode == 0, done.stderr
    assert VALID(json.loads(done.stdout))
    assert "structured output" in done.stderr
    talked = run(
        "chat", "--chat-template", str(tmp_path / "template.jinja"), "--json-schema", str(file), given="Hi\n"
    )
    assert talked.returncode == 0, talked.stderr
    assert VALID(json.loads(talked.stdout))
    for wrong, sentence in (
        (["--json-schema", str(bad)], "bad.json cannot be followed: Unsatisfiable"),
        (["--json-schema", str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--json-schema", str(file), "--ignore-eos"], "ignore_eos"),
    ):
        refused = run("--prompt", "x", *wrong)
        assert refused.returncode == 2
        assert sentence in refused.stderr
        assert refused.stderr.count("\n") == 1
