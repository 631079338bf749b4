"""Tools and formats over HTTP, with a session that writes what it is told: the official client's view."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_templates import HERMES, LLAMA, XML
from fake_session import FastSession
from pydantic import BaseModel
from serving import TEMPLATE, Served, served
from test_http import call, speak

from pipeline.ring.generation import Generation, GenerationParams, Piece
from pipeline.ring.messages import Finished
from pipeline.serving.client import Client
from storage.errors import UsageError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
QUESTION = {"role": "user", "content": "What is the weather in Rome?"}
CALLED = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ASKED = {"messages": [QUESTION], "tools": [WEATHER, NOW]}


class Writing(FastSession):
    """Writes its next text, three characters a token; remembers what was asked."""

    def __init__(self, *texts: str, reason: str = "stop") -> None:
        super().__init__()
        self.texts = list(texts)
        self.reason = reason
        self.asked: list[GenerationParams] = []

    def _stream(
        self, ids: list[int], params: GenerationParams, cancelled: Callable[[], bool]
    ) -> Generator[Piece, None, None]:
        self.asked.append(params)
        self.prompts.append(ids)
        self.last = Generation(prompt=tuple(ids), finished=Finished(1, self.reason, 0.01, 0.02))
        text = self.texts.pop(0)
        for at in range(0, len(text), 3):
            self.last.tokens.append(at)
            yield Piece(at, text[at : at + 3], -0.5)

    def prompt(self) -> str:
        return bytes(self.prompts[-1]).decode()


Serve = Callable[..., tuple[Served, Writing]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A server of a template and of a session that writes texts."""
    open_ones: list[Any] = []

    def start(*texts: str, template: str = HERMES, reason: str = "stop") -> tuple[Served, Writing]:
        session = Writing(*texts, reason=reason)
        base = tmp_path / str(len(open_ones))
        base.mkdir()
        open_ones.append(served(base, lambda: session, template=template, http={}))
        return open_ones[-1].__enter__(), session

    yield start
    for one in open_ones:
        one.__exit__(None, None, None)


# -- calls --------------------------------------------------------------------------------------


def test_calls_go_out_and_their_results_come_back(serve: Serve) -> None:
    server, session = serve(CALLED, "It is sunny.")
    with speak(server.url) as client:
        first = client.chat.completions.create(model="fake", **ASKED).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.content is None
        assert [(one.function.name, one.function.arguments) for one in first.message.tool_calls] == [
            ("weather", '{"city": "Rome"}'),
            ("now", "{}"),
        ]
        ids = [one.id for one in first.message.tool_calls]
        assert len({*ids}) == 2
        results = [{"role": "tool", "tool_call_id": one, "content": f"result {one}"} for one in ids]
        second = client.chat.completions.create(
            model="fake", messages=[QUESTION, first.message, *results], tools=[WEATHER, NOW]
        ).choices[0]
    assert (second.message.content, second.finish_reason) == ("It is sunny.", "stop")
    assert second.message.tool_calls is None
    prompt = session.prompt()
    assert prompt.index(json.dumps(WEATHER["function"]["parameters"])) < prompt.index(CALLED)
    assert prompt.index(CALLED) < prompt.index(f"<tool_response>\nresult {ids[0]}")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert all(params.grammar is not None for params in session.asked)


@pytest.mark.parametrize("text", [f"Let me see.\n{CALLED}", CALLED])
def test_a_stream_has_each_call_when_it_is_whole(serve: Serve, text: str) -> None:
    server, _ = serve(text)
    with speak(server.url) as client:
        stream = client.chat.completions.create(model="fake", stream=True, **ASKED)
        choices = [part.choices[0] for part in stream]
    calls = [one for choice in choices for one in choice.delta.tool_calls or []]
    assert [(one.index, one.type, one.function.name, one.function.arguments) for one in calls] == [
        (0, "function", "weather", '{"city": "Rome"}'),
        (1, "function", "now", "{}"),
    ]
    assert "".join(choice.delta.content or "" for choice in choices) == text.removesuffix(CALLED)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]


def test_text_is_no_call_and_logprobs_are_told_once(serve: Serve) -> None:
    server, _ = serve("a <tool_b", "a <tool_b")
    with speak(server.url) as client:
        whole = client.chat.completions.create(model="fake", **ASKED).choices[0]
        parts = [
            part.choices[0]
            for part in client.chat.completions.create(model="fake", stream=True, logprobs=True, **ASKED)
        ]
    assert (whole.message.content, whole.finish_reason) == ("a <tool_b", "stop")
    assert "".join(part.delta.content or "" for part in parts) == "a <tool_b"
    assert sum(len(part.logprobs.content) for part in parts if part.logprobs) == 3


def test_a_call_that_is_cut_is_text_of_length(serve: Serve) -> None:
    cut = CALLED[:40]
    server, _ = serve(cut, cut, CALLED[:-20], reason="length")
    with speak(server.url) as client:
        whole = client.chat.completions.create(model="fake", **ASKED).choices[0]
        parts = [
            part.choices[0] for part in client.chat.completions.create(model="fake", stream=True, **ASKED)
        ]
        second = client.chat.completions.create(model="fake", **ASKED).choices[0]
    assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (cut, None, "length")
    assert "".join(part.delta.content or "" for part in parts) == cut
    assert parts[-1].finish_reason == "length"
    assert [one.function.name for one in second.message.tool_calls] == ["weather"]
    assert second.finish_reason == "length"


def test_llamas_calls_and_one_function_by_name(serve: Serve) -> None:
    server, session = serve('{"name": "weather", "parameters": {"city": "Rome"}}', template=LLAMA)
    choice = {"type": "function", "function": {"name": "weather"}}
    with speak(server.url) as client:
        answer = client.chat.completions.create(model="fake", tool_choice=choice, **ASKED).choices[0]
    assert answer.message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    grammar = session.asked[0].grammar
    assert grammar is not None
    assert "now" not in grammar.text
    assert '"now"' in session.prompt(), "the model sees all of them"


def test_without_a_choice_the_model_does_not_hear_of_tools(serve: Serve) -> None:
    server, session = serve("Hm.", template=TEMPLATE)
    with speak(server.url) as client:
        client.chat.completions.create(model="fake", tool_choice="none", **ASKED)
    assert session.asked[0].grammar is None
    assert "weather" not in session.prompt().removeprefix("<user>What is the weather")


@pytest.mark.parametrize(
    ("template", "changes", "param", "sentence"),
    [
        (TEMPLATE, {}, "tools", "chat template does not show them"),
        (XML, {}, "tools", "none of the forms"),
        (
            HERMES,
            {"tool_choice": {"type": "function", "function": {"name": "frob"}}},
            "tool_choice",
            "'frob', which is none of the tools",
        ),
        (HERMES, {"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        (HERMES, {"tool_choice": "sometimes"}, "tool_choice", "tool_choice"),
        (HERMES, {"tools": [WEATHER, WEATHER]}, "tools", "two functions have one name"),
        (HERMES, {"tools": [{"type": "retrieval"}]}, "tools.0", "tools.0"),
        (HERMES, {"functions": [{}]}, "functions", "functions is not supported"),
        (LLAMA, {"response_format": {"type": "json_object"}}, None, "response_format beside tools"),
    ],
)
def test_tools_that_cannot_be_had_are_refused_by_name(
    serve: Serve, template: str, changes: dict[str, Any], param: str | None, sentence: str
) -> None:
    server, _ = serve(template=template)
    status, body = call(server.url, "/v1/chat/completions", ASKED | changes)
    assert status == 400
    assert sentence in body["error"]["message"]
    assert param is None or body["error"]["param"].startswith(param)


@pytest.mark.parametrize("parameters", [{"enum": []}, {"type": "string"}, {"properties": {"x": {"not": {}}}}])
def test_parameters_that_cannot_be_followed_are_refused(serve: Serve, parameters: dict[str, Any]) -> None:
    server, _ = serve()
    tool = {"type": "function", "function": {"name": "odd", "parameters": parameters}}
    status, body = call(server.url, "/v1/chat/completions", ASKED | {"tools": [WEATHER, tool]})
    assert (status, body["error"]["param"]) == (400, "tools")
    assert "the parameters of odd" in body["error"]["message"]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user"}, "content is missing"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "x", "arguments": "[]"}}]},
            "no JSON object",
        ),
    ],
)
def test_history_that_is_none_is_refused(serve: Serve, message: dict[str, Any], sentence: str) -> None:
    server, _ = serve()
    status, body = call(server.url, "/v1/chat/completions", {"messages": [QUESTION, message]})
    assert status == 400
    assert sentence in body["error"]["message"]


# -- formats ------------------------------------------------------------------------------------


class Person(BaseModel):
    name: str
    age: int


def test_a_format_becomes_the_grammar_of_the_answer(serve: Serve) -> None:
    server, session = serve('{"name": "Ada", "age": 36}', "{}", "{}", "x")
    with speak(server.url) as client:
        parsed = client.chat.completions.parse(model="fake", messages=[QUESTION], response_format=Person)
        assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
        anything = {"type": "json_object"}
        client.chat.completions.create(model="fake", messages=[QUESTION], response_format=anything)
        body = {"prompt": "x", "response_format": anything}
        assert call(server.url, "/v1/completions", body)[0] == 200
        client.chat.completions.create(model="fake", messages=[QUESTION], response_format={"type": "text"})
    grammars = ["" if params.grammar is None else params.grammar.text for params in session.asked]
    assert '"age"' in grammars[0]
    assert grammars[1] == grammars[2] != ""
    assert grammars[3] == ""


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"type": "grammar"}, "response_format"),
        ({"type": "json_schema"}, "json_schema is given where the type is"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "json_schema is given where"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strng"}}}, "strng"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}, "Unsatisfiable"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}, "without end"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_format_that_cannot_be_followed_is_refused_by_name(
    serve: Serve, wanted: dict[str, Any], sentence: str, path: str
) -> None:
    server, _ = serve()
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [QUESTION]}
    status, answer = call(server.url, path, body | {"response_format": wanted})
    assert status == 400
    assert answer["error"]["param"].startswith("response_format")
    assert sentence in answer["error"]["message"]


def test_a_format_and_ignore_eos_are_refused(serve: Serve) -> None:
    server, _ = serve()
    with speak(server.url) as client, pytest.raises(openai.BadRequestError, match="ignore_eos"):
        client.chat.completions.create(
            model="fake",
            messages=[QUESTION],
            response_format={"type": "json_object"},
            extra_body={"ignore_eos": True},
        )


# -- ZeroMQ -------------------------------------------------------------------------------------


def test_a_client_asks_for_json_of_a_schema(serve: Serve) -> None:
    server, session = serve("true", "plain")
    with Client(server.endpoint) as client:
        assert client.chat([QUESTION], json_schema={"type": "boolean"}).read() == "true"
        assert client.generate("x").read() == "plain"
        with pytest.raises(UsageError, match="Unsatisfiable"):
            client.generate("x", json_schema='{"enum": []}').read()
        with pytest.raises(UsageError, match="is not JSON"):
            client.generate("x", json_schema="{").read()
    first, second = (params.grammar for params in session.asked)
    assert first is not None
    assert '"boolean"' in first.text
    assert second is None
