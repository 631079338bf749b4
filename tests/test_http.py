"""The HTTP front over a fake ring: with the official client, with curl, and with bad manners."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import threading
from urllib.parse import urlsplit

import openai
import pytest
from fake_session import DyingSession, FastSession, GatedSession, text_of
from prometheus_client.parser import text_string_to_metric_families
from serving import served

from pipeline.config import Decoding
from pipeline.serving.endpoint import CurveKeys, check_endpoint, check_http, make_keys
from storage.errors import UsageError

WHOLE = "word by word"


def speak(url, **options):
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=options.pop("api_key", "unused"), max_retries=0, **options
    )


@pytest.fixture
def server(tmp_path):
    with served(tmp_path, http={}) as found:
        yield found


def call(url, path, body=None, headers=None):
    """(status, parsed or raw body) of one plain request."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} if data is not None else {}
        connection.request("GET" if data is None else "POST", path, data, own | (headers or {}))
        answer = connection.getresponse()
        text = answer.read()
        kind = answer.headers.get("Content-Type", "")
        return answer.status, json.loads(text) if kind.startswith("application/json") else text.decode()
    finally:
        connection.close()


def test_completions_with_the_official_client(server):
    with speak(server.url) as client:
        answer = client.completions.create(
            model="fake", prompt=WHOLE, max_tokens=6, temperature=0.5, top_p=0.9, seed=3, logprobs=1
        )
        pieces = list(
            client.completions.create(
                model="fake",
                prompt=WHOLE,
                max_tokens=6,
                temperature=0.5,
                top_p=0.9,
                seed=3,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    wanted = text_of(WHOLE, max_new_tokens=6, temperature=0.5, top_p=0.9, seed=3)
    assert answer.choices[0].text == wanted
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs.token_logprobs == [-0.5] * 6
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(WHOLE), 6)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == wanted
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "length"
    assert pieces[-1].usage.completion_tokens == 6


def test_chat_with_the_official_client(server):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    wanted = text_of("<system>Be brief.\n<user>Hi\n<assistant>", max_new_tokens=5, seed=1)
    with speak(server.url) as client:
        answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=5, seed=1)
        stream = client.chat.completions.create(
            model="fake", messages=messages, max_completion_tokens=5, seed=1, stream=True
        )
        pieces = [piece.choices[0].delta.content or "" for piece in stream]
    assert answer.choices[0].message.content == "".join(pieces) == wanted


def test_several_prompts_and_stop_strings(server):
    whole = text_of("a", max_new_tokens=4, seed=2)
    with speak(server.url) as client:
        answer = client.completions.create(
            model="fake", prompt=["a", "b"], max_tokens=4, seed=2, stop=whole[-3:]
        )
        tokens = client.completions.create(model="fake", prompt=list(b"ab"), max_tokens=2, seed=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == whole[: whole.index(whole[-3:])]
    assert answer.choices[0].finish_reason == "stop"
    assert tokens.choices[0].text == text_of("ab", max_new_tokens=2, seed=2)


def test_what_a_request_leaves_out_is_as_configured(tmp_path):
    defaults = Decoding(temperature=0.6, top_p=0.9, top_k=7)
    with served(tmp_path, http={}, defaults=defaults) as server, speak(server.url) as client:
        left = client.completions.create(model="fake", prompt="x", seed=1)
        given = client.completions.create(model="fake", prompt="x", seed=1, temperature=0, top_p=1)
    wanted = {"max_new_tokens": 16, "top_k": 7, "seed": 1}  # 16: OpenAI's own limit
    assert left.choices[0].text == text_of("x", temperature=0.6, top_p=0.9, **wanted)
    assert given.choices[0].text == text_of("x", temperature=0.0, top_p=1.0, **wanted)


def test_models(server):
    with speak(server.url) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").owned_by == "flashring"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("another")
        with pytest.raises(openai.NotFoundError, match="has the model 'fake'"):
            client.completions.create(model="another", prompt="x")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"echo": True}, "echo"),
        ({"tempurature": 1}, "tempurature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, changes, param):
    status, body = call(server.url, "/v1/completions", {"prompt": "x"} | changes)
    assert status == 400
    assert body["error"]["param"] == param
    assert param in body["error"]["message"]


def test_wrong_values_and_bodies_are_refused(server):
    assert call(server.url, "/v1/completions", {"prompt": "x", "top_p": 7})[0] == 400
    assert call(server.url, "/v1/completions", {"prompt": "x", "top_k": 2**64})[0] == 400
    assert call(server.url, "/v1/completions", {"prompt": ""})[0] == 400
    assert call(server.url, "/v1/completions", b"{not json")[0] == 400
    assert call(server.url, "/v1/completions", b"\xff\xfe")[0] == 400
    assert call(server.url, "/v1/chat/completions", {"messages": []})[0] == 400
    assert call(server.url, "/v1/chat/completions", {"messages": [{"role": "x", "content": "y"}]})[0] == 400
    assert call(server.url, "/nowhere")[0] == 404
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert call(server.url, "/v1/completions", {"prompt": "x"}, form)[0] == 415
    assert call(server.url, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_body_over_the_limit_is_refused(tmp_path):
    with served(tmp_path, http={"max_body": 1000}) as server:
        status, body = call(server.url, "/v1/completions", {"prompt": "x" * 2000})
    assert status == 413
    assert "1,000 bytes" in body["error"]["message"]


def test_a_full_queue_is_429(tmp_path):
    session = GatedSession()
    with served(tmp_path, lambda: session, queue_limit=1, http={}) as server, speak(server.url) as client:
        first = threading.Thread(target=call, args=(server.url, "/v1/completions", {"prompt": "a"}))
        first.start()
        server.until(lambda: server.scheduler.running is not None)
        second = threading.Thread(target=call, args=(server.url, "/v1/completions", {"prompt": "b"}))
        second.start()
        server.until(lambda: server.scheduler.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="waiting already") as full:
            client.completions.create(model="fake", prompt="c")
        assert full.value.code == "rate_limit_exceeded"
        assert full.value.response.headers["Retry-After"] == "1"
        session.let(100)
        first.join()
        second.join()


def test_a_deadline_is_504(tmp_path):
    with served(tmp_path, GatedSession, http={}) as server:
        status, body = call(server.url, "/v1/completions", {"prompt": "a", "deadline": 0.05})
    assert status == 504
    assert body["error"]["code"] == "deadline"


def test_a_dead_ring_is_503_and_in_mid_stream_an_error(tmp_path):
    sessions = [DyingSession(), DyingSession(), FastSession()]
    with served(tmp_path, lambda: sessions.pop(0), http={}) as server, speak(server.url) as client:
        assert call(server.url, "/v1/completions", {"prompt": "a"})[0] == 503
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(client.completions.create(model="fake", prompt="a", stream=True))
        assert call(server.url, "/v1/completions", {"prompt": "a"})[0] == 200
        assert call(server.url, "/health")[1]["status"] == "ready"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_ring(tmp_path, stream):
    session = GatedSession()
    with served(tmp_path, lambda: session, http={}) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 1000, "stream": stream}).encode()
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as leaving:
            leaving.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            session.let(1)
            if stream:
                assert leaving.recv(100).startswith(b"HTTP/1.1 200")
            else:
                server.until(session.started.is_set)
        server.until(lambda: server.scheduler.running is None)
        assert session.last is not None
        assert len(session.last.tokens) <= 2


def test_a_body_that_is_cut_short_is_no_failure_of_the_server(tmp_path, caplog):
    with served(tmp_path, http={}) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as leaving:
            leaving.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 50\r\n\r\n{"
            )
        assert call(server.url, "/v1/completions", {"prompt": "a"})[0] == 200
    assert [record for record in caplog.records if record.exc_info] == []


def test_curl_streams(server):
    body = json.dumps({"prompt": WHOLE, "max_tokens": 3, "seed": 0, "temperature": 0, "stream": True})
    command = [
        "curl",
        "-sN",
        f"{server.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split(
        "\n\n"
    )
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == text_of(WHOLE, max_new_tokens=3)


def test_a_token_whose_text_is_held_back_keeps_its_logprob_in_a_stream(server):
    begun = text_of("x", max_new_tokens=1, seed=0)
    with speak(server.url) as client:
        pieces = list(
            client.completions.create(
                model="fake",
                prompt="x",
                max_tokens=3,
                seed=0,
                logprobs=1,
                stop=f"{begun} never",
                stream=True,
            )
        )
    choices = [piece.choices[0] for piece in pieces]
    logprobs = [one for choice in choices if choice.logprobs for one in choice.logprobs.token_logprobs]
    assert choices[0].text == "", "held back: the stop string begins like it"
    assert logprobs == [-0.5] * 3
    assert "".join(choice.text for choice in choices) == text_of("x", max_new_tokens=3, seed=0)


def test_metrics_are_prometheus_text(server):
    with speak(server.url) as client:
        client.completions.create(model="fake", prompt=WHOLE, max_tokens=5)
    status, text = call(server.url, "/metrics")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert status == 200
    assert found["flashring_generated_tokens_total",] == 5
    assert found["flashring_prompt_tokens_total",] == len(WHOLE)
    assert found["flashring_requests_total", "length"] == 1
    assert found["flashring_token_seconds_count",] == 4
    assert found["flashring_first_token_seconds_count",] == 1
    assert found["flashring_request_seconds_count",] == 1
    assert found["flashring_flash_read_bytes_total", "decode"] == 1000
    assert found["flashring_cache_hit_ratio",] == 0.75
    assert found["flashring_queue_length",] == 0


def test_an_api_key_is_asked_for(tmp_path):
    with served(tmp_path, http={"api_key": "a-key-of-some-length"}) as server:
        assert call(server.url, "/v1/models")[0] == 401
        assert call(server.url, "/metrics")[0] == 401
        assert call(server.url, "/ring")[0] == 401
        assert call(server.url, "/health")[0] == 200
        with speak(server.url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with speak(server.url, api_key="a-key-of-some-length") as client:
            assert client.models.list().data


def test_names_of_other_machines_are_refused_on_loopback(server):
    status, _ = call(server.url, "/v1/models", headers={"Host": "evil.example:8080"})
    assert status == 403
    assert call(server.url, "/v1/models", headers={"Host": "localhost:1"})[0] == 200


def test_beyond_loopback_keys_are_needed():
    with pytest.raises(UsageError, match="--api-key-file"):
        check_http("0.0.0.0:0", api_key="")
    assert check_http("[::1]:80", api_key="") == ("::1", 80)
    for endpoint in ("tcp://0.0.0.0:5555", "tcp://192.0.2.1:5555", "tcp://*:5555"):
        with pytest.raises(UsageError, match="--curve-keys"):
            check_endpoint(endpoint, None)
    with pytest.raises(UsageError, match="neither ipc"):
        check_endpoint("udp://127.0.0.1:1", None)
    check_endpoint("tcp://127.0.0.1:5555", None)


def test_curve_lets_only_known_clients_in(tmp_path):
    from pipeline.errors import ServerUnavailable
    from pipeline.serving.client import Client

    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "stranger")
    with pytest.raises(UsageError, match="holds keys already"):
        make_keys(tmp_path / "keys")
    own = CurveKeys(tmp_path / "keys" / "server.key_secret", tmp_path / "keys" / "clients")
    public = tmp_path / "keys" / "server.key"
    with served(tmp_path, endpoint="tcp://127.0.0.1:0", keys=own) as server:
        known = CurveKeys(tmp_path / "keys" / "client.key_secret", public)
        with Client(server.endpoint, keys=known) as client:
            assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)
        for keys in (CurveKeys(tmp_path / "stranger" / "client.key_secret", public), None):
            with pytest.raises(ServerUnavailable):
                Client(server.endpoint, timeout=0.3, keys=keys)


def test_the_async_official_client_shares_the_ring(server):
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            answers = await asyncio.gather(
                *[
                    client.completions.create(
                        model="fake", prompt=f"p{number}", max_tokens=4, temperature=0, seed=0
                    )
                    for number in range(6)
                ]
            )
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(talk()) == [text_of(f"p{number}", max_new_tokens=4, seed=0) for number in range(6)]


def test_the_page_takes_nothing_from_elsewhere(server):
    status, page = call(server.url, "/")
    assert status == 200
    assert re.findall(r"https?://|src=|@import|url\(|<link", page) == []


def test_what_the_page_calls_is_there(server):
    _, page = call(server.url, "/")
    called = set(re.findall(r'(?:fetch|stream)\("([^"]+)"', page))
    assert called == {"ring", "v1/completions", "v1/chat/completions"}
    status, ring = call(server.url, "/ring")
    assert status == 200
    assert {"status", "model", "chat", "waiting", "time", "disk_ceiling", "memory_bytes", "prompt"} <= set(
        ring
    )
    for path in called - {"ring"}:
        assert call(server.url, f"/{path}", {})[0] == 400  # it is there, and says what is missing
