"""What clients of OpenAI's API are used to: neutral fields, error codes they act on, and proxies between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_session import CONTEXT, GatedSession, text_of
from serving import served
from test_http import call, speak

from pipeline.serving.openai_api import ChatRequest, CompletionRequest, parse
from pipeline.serving.openai_tools import BadRequest

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
PARAMETERS = {  # of OpenAI's chat completions, all that may be left out
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_tokens", "metadata", "modalities", "model", "n", "parallel_tool_calls",
    "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort",
    "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "stream",
    "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity",
    "web_search_options",
}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(PARAMETERS), "a_field_of_tomorrow", "ignore_eos", "deadline"])
def test_null_is_as_if_absent(name: str) -> None:
    given = parse(ChatRequest, json.dumps({**HELLO, name: None}).encode())
    given.check()
    absent = parse(ChatRequest, json.dumps(HELLO).encode())
    assert given.model_dump() == absent.model_dump()
    if name in CompletionRequest.model_fields:
        parse(CompletionRequest, json.dumps({"prompt": "x", name: None}).encode()).check()


@pytest.mark.parametrize(
    "field",
    [
        {"user": "u"},
        {"safety_identifier": "u"},
        {"prompt_cache_key": "k"},
        {"prompt_cache_retention": "24h"},
        {"store": True},
        {"metadata": {"a": "b"}},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"prediction": {"type": "content", "content": "Yo"}},
        {"n": 1},
        {"logit_bias": {}},
        {"presence_penalty": 0},
        {"frequency_penalty": 0.0},
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"function_call": "none"},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"verbosity": "medium"},
        {"reasoning_effort": "none"},
        {"stream_options": {"include_usage": True}},
    ],
    ids=json.dumps,
)
def test_what_asks_for_nothing_is_taken(field: dict[str, Any]) -> None:
    parse(ChatRequest, json.dumps({**HELLO, **field}).encode()).check()


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ({"reasoning_effort": "high"}, "unsupported_parameter"),
        ({"verbosity": "low"}, "unsupported_parameter"),
        ({"web_search_options": {}}, "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter"),
        ({"n": 2}, "unsupported_parameter"),
        ({"a_field_of_tomorrow": 1}, "unknown_parameter"),
    ],
    ids=json.dumps,
)
def test_what_would_change_the_answer_is_refused_by_name(field: dict[str, Any], code: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(ChatRequest, json.dumps({**HELLO, **field}).encode()).check()
    assert (refused.value.param, refused.value.code) == (*field, code)


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, {"prompt": 5}, "prompt"),
        (CompletionRequest, {"prompt": ["a", 5]}, "prompt.1"),
        (CompletionRequest, {"prompt": [[1, "x"]]}, "prompt.0.1"),
        (CompletionRequest, {}, "prompt"),
        (CompletionRequest, {"prompt": None}, "prompt"),
        (CompletionRequest, {"prompt": "x", "stop": 5}, "stop"),
        (CompletionRequest, {"prompt": "x", "temperature": "hot"}, "temperature"),
        (
            CompletionRequest,
            {"prompt": "x", "stream_options": {"include_usage": 7}},
            "stream_options.include_usage",
        ),
        (ChatRequest, {"messages": "Hi"}, "messages"),
        (ChatRequest, {"messages": [{"content": "Hi"}]}, "messages.0.role"),
        (ChatRequest, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (ChatRequest, {**HELLO, "tool_choice": "perhaps"}, "tool_choice"),
        (ChatRequest, {**HELLO, "tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        (ChatRequest, [], None),
        (ChatRequest, 5, None),
    ],
)
def test_param_names_a_field_that_is_there(kind: Any, body: Any, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(kind, json.dumps(body).encode())
    found = refused.value.param
    assert found is None if param is None else (found or "").startswith(param.split(".")[0])
    assert found == param or str(found).startswith(f"{param}.") or str(param).startswith(f"{found}.")
    assert not any(sign in (found or "") for sign in "[]()")


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_a_prompt_beyond_the_context_has_openais_code(kind: str, tmp_path: Path) -> None:
    long = "x" * (CONTEXT + 1)
    chat = kind.startswith("chat")
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": long}]} if chat else {"prompt": long}
    with served(tmp_path, http={}) as server:
        for stream in (False, True):
            status, body = call(server.url, f"/v1/{kind}", {**asked, "stream": stream})
            assert status == 400
            assert body["error"]["code"] == "context_length_exceeded"
            assert body["error"]["type"] == "invalid_request_error"
            assert body["error"]["param"] == next(iter(asked))


def test_codes_that_clients_act_on(tmp_path: Path) -> None:
    session = GatedSession()
    with (
        served(tmp_path, lambda: session, queue_limit=1, http={"api_key": "k"}) as server,
        speak(server.url, api_key="k") as client,
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="gpt-7", **HELLO)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        assert unknown.value.type == "invalid_request_error"
        status, body = call(server.url, "/v1/models")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert body["error"]["type"] == "invalid_request_error"


def test_an_assistant_that_said_nothing_and_contents_in_parts(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "?"},
    ]
    wanted = "<user>Hi!\n<assistant>\n<assistant>No.\n<user>?\n<assistant>"
    with served(tmp_path, http={}) as server, speak(server.url) as client:
        answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=3, seed=1)
        assert answer.choices[0].message.content == text_of(wanted, max_new_tokens=3, seed=1)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="fake", messages=[{"role": "user", "content": None}])
    assert refused.value.param == "messages.0.content"


def test_a_stream_that_waits_for_a_long_prompt_is_not_silent(tmp_path: Path) -> None:
    session = GatedSession()
    with served(tmp_path, lambda: session, http={"keep_alive": 0.05}) as server:
        import http.client
        from urllib.parse import urlsplit

        address = urlsplit(server.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        try:
            body = json.dumps({"prompt": "a", "max_tokens": 2, "seed": 1, "stream": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()  # before any token has come
            assert answer.headers["X-Accel-Buffering"] == "no"
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert answer.readline().startswith(b": ")
            session.let(2)
            text = answer.read().decode()
        finally:
            connection.close()
    lines = [line for line in text.splitlines() if line and not line.startswith(":")]
    found = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(one["choices"][0]["text"] for one in found) == text_of("a", max_new_tokens=2, seed=1)
    assert lines[-1] == "data: [DONE]"


def test_the_official_client_reads_over_comments(tmp_path: Path) -> None:
    session = GatedSession()
    with (
        served(tmp_path, lambda: session, http={"keep_alive": 0.02}) as server,
        speak(server.url) as client,
        client.completions.create(model="fake", prompt="a", max_tokens=3, seed=1, stream=True) as stream,
    ):
        session.let(3)
        text = "".join(piece.choices[0].text for piece in stream)
    assert text == text_of("a", max_new_tokens=3, seed=1)
