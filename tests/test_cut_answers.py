"""An answer that was cut never looks finished: over HTTP, streamed and whole, over ZeroMQ, and in process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_session import CONTEXT, DyingSession, FastSession, GatedSession, text_of
from serving import Served, served
from test_http import call, speak

from pipeline.errors import AnswerCut, DeadlineExceeded, ServerUnavailable
from pipeline.serving.client import AsyncClient, Client
from pipeline.serving.embed import Pipeline
from pipeline.serving.warm_ring import WarmRing
from storage.errors import RingError


def stop(server: Served) -> None:
    """As SIGTERM does it: the scheduler first, while the fronts still stand."""
    asyncio.run_coroutine_threadsafe(server.scheduler.stop(), server.loop).result(30)


class Asked:
    """What came of a request, in a thread of its own."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.answer: Any = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(ask,))
        self._thread.start()

    def _run(self, ask: Callable[[], Any]) -> None:
        try:
            self.answer = ask()
        except Exception as error:
            self.error = error

    def wait(self) -> Asked:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_ends_in_mid_answer_over_http(tmp_path: Path, chat: bool) -> None:
    session = GatedSession()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    with served(tmp_path, lambda: session, http={}) as server:
        whole = Asked(lambda: call(server.url, path, {**asked, "max_tokens": 9}))
        server.until(lambda: server.scheduler.running is not None)
        streamed = Asked(lambda: call(server.url, path, {**asked, "max_tokens": 9, "stream": True}))
        server.until(lambda: server.scheduler.waiting == 1)
        session.let(9 + 2)
        server.until(lambda: server.scheduler.observer.generated_tokens >= 11)
        assert whole.wait().answer[0] == 200
        stop(server)
        status, text = streamed.wait().answer
    assert status == 200
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert events[-1]["error"]["code"] == "stopping"
    assert all(one["choices"][0]["finish_reason"] is None for one in events[:-1])
    assert len(events) >= 3  # what had come before is there
    assert "[DONE]" not in text


def test_a_server_that_ends_refuses_a_whole_answer(tmp_path: Path) -> None:
    session = GatedSession()
    with served(tmp_path, lambda: session, http={}) as server:
        whole = Asked(lambda: call(server.url, "/v1/completions", {"prompt": "a", "max_tokens": 9}))
        session.let(2)
        server.until(lambda: server.scheduler.observer.generated_tokens == 2)
        stop(server)
        status, body = whole.wait().answer
    assert status == 503
    assert body["error"]["code"] == "stopping"
    assert "choices" not in body


def test_the_official_client_raises(tmp_path: Path) -> None:
    session = GatedSession()
    with served(tmp_path, lambda: session, http={}) as server, speak(server.url) as client:

        def read() -> list[Any]:
            return list(client.completions.create(model="fake", prompt="a", max_tokens=9, stream=True))

        streamed = Asked(read)
        session.let(1)
        server.until(lambda: server.scheduler.observer.generated_tokens == 1)
        stop(server)
        assert isinstance(streamed.wait().error, openai.APIError)


def test_a_server_that_ends_in_mid_answer_over_zeromq(tmp_path: Path) -> None:
    session = GatedSession()
    with served(tmp_path, lambda: session) as server, Client(server.endpoint, timeout=5) as client:
        answer = client.generate("a", max_new_tokens=9)
        session.let(1)
        assert next(answer)
        server.until(lambda: server.scheduler.observer.generated_tokens == 1)
        stop(server)
        with pytest.raises(ServerUnavailable, match="stopping"):
            answer.read()
        assert answer.done is None
        with pytest.raises(AnswerCut):  # also whoever asks once more
            next(answer)


def test_an_answer_that_its_own_client_cancelled_is_done(tmp_path: Path) -> None:
    """Cutting it was its reader's wish: no error, and a reason that says so."""
    session = GatedSession()
    with served(tmp_path, lambda: session) as server, Client(server.endpoint, timeout=5) as client:
        answer = client.generate("a", max_new_tokens=9)
        session.let(1)
        assert next(answer)
        answer.close()
        assert list(answer) == []
        session.let(50)
        assert client.generate("b", max_new_tokens=5).read() == text_of("b", max_new_tokens=5)


def test_an_async_answer_is_the_same(tmp_path: Path) -> None:
    session = GatedSession()

    async def ask(server: Served) -> None:
        async with AsyncClient(server.endpoint, timeout=5) as client:
            answer = client.generate("a", max_new_tokens=9)
            session.let(1)
            assert await anext(answer)
            await asyncio.to_thread(stop, server)
            with pytest.raises(ServerUnavailable):
                await answer.read()
            with pytest.raises(AnswerCut):
                await anext(answer)

    with served(tmp_path, lambda: session) as server:
        asyncio.run(ask(server))


@pytest.mark.parametrize("end", ["close", "another"])
def test_an_answer_in_process_that_another_ends(end: str) -> None:
    with Pipeline(WarmRing(FastSession)) as pipeline:
        answer = pipeline.generate("a", max_new_tokens=9)
        assert next(answer)
        if end == "close":
            pipeline.close()
        else:
            pipeline.generate("b", max_new_tokens=1)
        with pytest.raises(AnswerCut, match="cut before its end"):
            answer.read()
        assert answer.done is None


@pytest.mark.parametrize(("session", "kind"), [(DyingSession, RingError), (GatedSession, DeadlineExceeded)])
def test_a_dead_ring_and_a_deadline_in_process(session: type[FastSession], kind: type[Exception]) -> None:
    sessions = [session(), FastSession()]
    with Pipeline(WarmRing(lambda: sessions.pop(0))) as pipeline:
        answer = pipeline.generate("a", max_new_tokens=9, deadline=0.2 if kind is DeadlineExceeded else 0.0)
        with pytest.raises(kind):
            answer.read()
        with pytest.raises(AnswerCut):
            answer.read()


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_context_is_length(tmp_path: Path, stream: bool) -> None:
    prompt = "x" * (CONTEXT - 3)
    with served(tmp_path, http={}) as server, speak(server.url) as client:
        answer = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": prompt[:-25]}], stream=stream
        )
        last = list(answer)[-1] if stream else answer
    assert last.choices[0].finish_reason == "length"
    with Pipeline(WarmRing(FastSession)) as pipeline:
        inside = pipeline.generate(prompt, max_new_tokens=50)
        inside.read()
        assert inside.done is not None
        assert (inside.done.reason, inside.done.generated_tokens) == ("length", 3)
