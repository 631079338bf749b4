"""The ZeroMQ server and its clients, over a fake ring."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from fake_session import BuggySession, DeadSession, DyingSession, FastSession, GatedSession, text_of
from serving import served

from pipeline import Pipeline
from pipeline.config import Decoding
from pipeline.errors import (
    DeadlineExceeded,
    ProtocolMismatch,
    QueueFull,
    ServerUnavailable,
    ServingError,
)
from pipeline.serving.client import AsyncClient, Client
from pipeline.serving.client_messages import (
    CLIENT_PROTOCOL_VERSION,
    AskHealth,
    Done,
    Error,
    Health,
    Hello,
    Submit,
    Token,
    Waiting,
    Welcome,
    decode,
    encode,
)
from pipeline.serving.endpoint import check_endpoint
from pipeline.serving.scheduler import Event, Job, Scheduler
from pipeline.serving.warm_ring import WarmRing
from storage.errors import RingError, UsageError

ROOT = Path(__file__).resolve().parent.parent


def submit(request: int, tokens: int = 5, prompt: str = "raw") -> Submit:
    return Submit(request, prompt, (), (), tokens, 0.0, 0, 1.0, 0, (), False, 0.0)


class RawClient:
    """A client that does only what it is told."""

    def __init__(self, endpoint: str, greet: bool = True) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        if greet:
            self.send(Hello(CLIENT_PROTOCOL_VERSION, "raw"))
            assert isinstance(self.receive(), Welcome)

    def send(self, message) -> None:
        self.socket.send(encode(message))

    def receive(self):
        assert self.socket.poll(20_000), "no answer"
        return decode(self.socket.recv())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.context.term()


def test_text_comes_in_pieces_and_is_summed_up(tmp_path):
    with served(tmp_path) as server, Client(server.endpoint) as client:
        answer = client.generate("Once upon", max_new_tokens=7, seed=3, temperature=0.5, top_k=4, top_p=0.9)
        pieces = list(answer)
    assert len(pieces) == 7
    wanted = text_of("Once upon", max_new_tokens=7, seed=3, temperature=0.5, top_k=4, top_p=0.9)
    assert "".join(pieces) == answer.text == wanted
    assert answer.done is not None
    assert (answer.done.reason, answer.done.prompt_tokens, answer.done.generated_tokens) == ("length", 9, 7)
    assert answer.logprobs == [-0.5] * 7
    assert client.server.model == "fake"


def test_token_ids_are_a_prompt_too(tmp_path):
    with served(tmp_path) as server, Client(server.endpoint) as client:
        assert client.generate(list(b"ab"), max_new_tokens=3).read() == text_of("ab", max_new_tokens=3)


def test_chat_goes_through_the_template(tmp_path):
    session = FastSession()
    with served(tmp_path, lambda: session) as server, Client(server.endpoint) as client:
        client.chat([{"role": "user", "content": "Hi"}], max_new_tokens=1).read()
        with pytest.raises(UsageError, match="needs a role"):
            client.chat([{"role": "nobody", "content": "Hi"}]).read()
    assert bytes(session.prompts[0]).decode() == "<user>Hi\n<assistant>"


def test_answer_ends_before_a_stop_string_that_spans_tokens(tmp_path):
    whole = text_of("x", max_new_tokens=12)
    stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 3]
    with served(tmp_path) as server, Client(server.endpoint) as client:
        answer = client.generate("x", max_new_tokens=12, stop=["never", stop])
        assert answer.read() == whole[: whole.index(stop)]
    assert answer.done is not None
    assert answer.done.reason == "stop"


def test_several_answers_of_one_client_interleave(tmp_path):
    with served(tmp_path) as server, Client(server.endpoint) as client:
        first = client.generate("a", max_new_tokens=4)
        second = client.generate("b", max_new_tokens=4)
        assert second.read() == text_of("b", max_new_tokens=4)
        assert first.read() == text_of("a", max_new_tokens=4)


def test_eight_clients_of_twenty_requests_get_what_a_lone_run_gives(tmp_path):
    def talk(number: int) -> list[str]:
        with Client(server.endpoint) as client:
            return [
                client.generate(f"client {number}", max_new_tokens=10, seed=turn, temperature=1.0).read()
                for turn in range(20)
            ]

    with served(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(talk, range(8)))
    assert texts == [
        [text_of(f"client {number}", max_new_tokens=10, seed=turn, temperature=1.0) for turn in range(20)]
        for number in range(8)
    ]


def test_clients_take_turns(tmp_path):
    session = GatedSession()
    with (
        served(tmp_path, lambda: session) as server,
        Client(server.endpoint) as greedy,
        Client(server.endpoint) as modest,
    ):
        running = greedy.generate("0", max_new_tokens=1)
        many = [greedy.generate(f"g{number}", max_new_tokens=1) for number in range(3)]
        one = modest.generate("m", max_new_tokens=1)
        server.until(lambda: server.scheduler.waiting == 4)
        session.let(100)
        for answer in (running, *many, one):
            answer.read()
    served_order = [bytes(prompt).decode() for prompt in session.prompts]
    assert served_order == ["0", "g0", "m", "g1", "g2"]


def test_a_full_queue_is_said(tmp_path):
    session = GatedSession()
    with served(tmp_path, lambda: session, queue_limit=2) as server, Client(server.endpoint) as client:
        client.generate("runs")
        server.until(lambda: server.scheduler.running is not None)
        client.generate("waits")
        client.generate("waits too")
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            client.generate("too much")
        assert client.stats()["requests.queue-full"] == 1


def test_cancel_frees_the_ring_at_the_next_token(tmp_path):
    session = GatedSession()
    with served(tmp_path, lambda: session) as server, Client(server.endpoint) as client:
        session.let(2)
        answer = client.generate("long", max_new_tokens=1000)
        assert next(answer) + next(answer) == text_of("long", max_new_tokens=2)
        answer.close()
        server.until(lambda: server.scheduler.running is None)
        assert session.last is not None
        assert len(session.last.tokens) <= 3
        session.let(3)
        assert client.generate("next", max_new_tokens=3).read() == text_of("next", max_new_tokens=3)


def test_a_waiting_request_can_be_cancelled(tmp_path):
    session = GatedSession()
    with served(tmp_path, lambda: session) as server, Client(server.endpoint) as client:
        client.generate("runs", max_new_tokens=1)
        waits = client.generate("waits")
        waits.close()
        server.until(lambda: server.scheduler.waiting == 0)
        session.let(1)
        server.until(lambda: server.scheduler.running is None)
    assert session.runs == 1


@pytest.mark.parametrize("running", [True, False])
def test_a_deadline_ends_a_request_wherever_it_is(tmp_path, running):
    session = GatedSession()
    with served(tmp_path, lambda: session) as server, Client(server.endpoint) as client:
        if not running:
            client.generate("runs")
            server.until(lambda: server.scheduler.running is not None)
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            client.generate("late", deadline=0.05).read()
        server.until(lambda: server.scheduler.waiting == 0)


def test_a_deadline_ends_an_answer_in_the_own_program_too():
    with Pipeline(WarmRing(FastSession)) as pipeline:
        late = pipeline.generate("late", max_new_tokens=4000, deadline=1e-9)
        with pytest.raises(DeadlineExceeded, match="the request's deadline of 1e-09 s has passed"):
            late.read()
        assert late.done is None
        with pytest.raises(UsageError, match="deadline"):
            pipeline.generate("x", deadline=float("nan"))
        in_time = pipeline.generate("x", max_new_tokens=2, deadline=3600.0)
        assert in_time.read() == text_of("x", max_new_tokens=2)


def test_wrong_parameters_are_usage_errors(tmp_path):
    with served(tmp_path, max_message=10_000) as server, Client(server.endpoint) as client:
        for wrong in (
            {"top_p": 2.0},
            {"top_k": 2**31},
            {"max_new_tokens": 0},
            {"temperature": -1.0},
            {"seed": -1},
            {"deadline": -1.0},
            {"deadline": float("nan")},
        ):
            with pytest.raises(UsageError, match=next(iter(wrong))):
                client.generate("x", **wrong).read()
        assert server.ask(lambda: server.scheduler.waiting) == 0
        with pytest.raises(UsageError, match="wrong kind"):
            client.generate("x", seed="one")
        with pytest.raises(UsageError, match="prompt is empty"):
            client.generate("").read()
        with pytest.raises(UsageError, match="the server takes 10,000"):
            client.generate("x" * 20_000)
        assert client.generate("x", max_new_tokens=1).read()


def test_health_needs_no_greeting(tmp_path):
    with served(tmp_path) as server, RawClient(server.endpoint, greet=False) as raw:
        raw.send(AskHealth(5))
        assert raw.receive() == Health(5, "ready", 0)


def test_another_protocol_version_is_refused(tmp_path, monkeypatch):
    with served(tmp_path) as server:
        with RawClient(server.endpoint, greet=False) as raw:
            raw.send(Hello(CLIENT_PROTOCOL_VERSION + 1, "from the future"))
            answer = raw.receive()
            assert isinstance(answer, Error)
            assert answer.code == "version"
        monkeypatch.setattr("pipeline.serving.conversation.CLIENT_PROTOCOL_VERSION", 99)
        with pytest.raises(ProtocolMismatch, match="the client 99"):
            Client(server.endpoint)
        monkeypatch.undo()
        with Client(server.endpoint) as client:
            assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)


def test_requests_before_a_greeting_are_refused(tmp_path):
    with served(tmp_path) as server, RawClient(server.endpoint, greet=False) as raw:
        raw.send(submit(4))
        answer = raw.receive()
    assert isinstance(answer, Error)
    assert (answer.request, answer.code) == (4, "hello")


def random_frame(source: random.Random) -> bytes:
    """Noise, and what looks like a message but is none."""
    if source.random() < 0.5:
        return source.randbytes(source.randrange(200))
    frame = bytearray(encode(submit(source.randrange(1000))))
    frame[source.randrange(len(frame))] ^= 1 << source.randrange(8)
    return bytes(frame[: source.randrange(len(frame))])


def test_ten_thousand_random_frames_change_nothing(tmp_path):
    source = random.Random(6)
    tracemalloc.start()  # what Python holds: the process's own size depends on the tests before
    with served(tmp_path) as server:
        with RawClient(server.endpoint) as raw:

            def feed(frames: int) -> int:
                for _ in range(frames):
                    raw.socket.send(random_frame(source))
                    while raw.socket.poll(0):
                        raw.socket.recv()
                raw.send(AskHealth(0))
                while not isinstance(raw.receive(), Health):
                    pass
                gc.collect()
                return tracemalloc.get_traced_memory()[0]

            warm = feed(1000)
            grown = feed(10_000) - warm
            tracemalloc.stop()
        malformed = server.ask(lambda: server.scheduler.observer.malformed_frames)
        assert malformed > 5000
        assert grown < 256 << 10
        assert server.ask(lambda: (len(server.server._jobs), server.scheduler.waiting)) == (0, 0)
        with Client(server.endpoint) as client:
            assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)


def test_a_frame_over_the_limit_costs_only_its_own_connection(tmp_path):
    with (
        served(tmp_path, max_message=10_000) as server,
        RawClient(server.endpoint) as raw,
        Client(server.endpoint) as client,
    ):
        raw.socket.send(b"x" * 100_000)
        assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)


def test_a_client_that_never_reads_blocks_nobody(tmp_path):
    with (
        served(tmp_path, heartbeat=0.05) as server,
        RawClient(server.endpoint) as mute,
        Client(server.endpoint) as client,
    ):
        for number in range(60):
            mute.send(submit(number, tokens=4000))
        server.until(lambda: server.scheduler.running is not None)
        assert client.generate("x", max_new_tokens=3).read() == text_of("x", max_new_tokens=3)
        server.until(lambda: server.scheduler.observer.dropped_clients == 1)
        server.until(lambda: server.scheduler.running is None and server.scheduler.waiting == 0)
        assert server.ask(lambda: len(server.server._jobs)) == 0
        while not (isinstance(last := mute.receive(), Error) and last.code == "slow"):
            pass  # it reads at last, and is told
        server.until(lambda: not server.server._owed)


def test_a_burst_is_not_taken_for_a_client_that_does_not_read(tmp_path):
    with served(tmp_path) as server, Client(server.endpoint) as client:
        for _ in range(3):
            assert client.generate("x", max_new_tokens=4000).read() == text_of("x", max_new_tokens=4000)


KILLED_CLIENT = """
import sys
from pipeline.serving.client import Client
client = Client(sys.argv[1])
answers = [client.generate("long", max_new_tokens=1000) for _ in range(3)]
print(next(answers[0]), flush=True)
next(answers[0])
"""


def test_a_killed_client_frees_the_ring(tmp_path):
    session = GatedSession()
    with served(tmp_path, lambda: session, heartbeat=0.05) as server:
        session.let(1)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", KILLED_CLIENT, server.endpoint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline()
            killed.send_signal(signal.SIGKILL)
        server.until(lambda: server.scheduler.running is None and server.scheduler.waiting == 0)
        assert session.last is not None
        assert len(session.last.tokens) <= 2
        assert server.ask(lambda: len(server.server._jobs)) == 0
        session.let(2)
        with Client(server.endpoint) as client:
            assert client.generate("next", max_new_tokens=2).read() == text_of("next", max_new_tokens=2)


def test_a_dead_ring_is_told_and_started_again(tmp_path):
    sessions = [DyingSession(), FastSession()]
    with served(tmp_path, lambda: sessions.pop(0)) as server, Client(server.endpoint) as client:
        answer = client.generate("x", max_new_tokens=5)
        with pytest.raises(RingError, match=r"cache worker .* SIGKILL"):
            answer.read()
        assert answer.text == text_of("x", max_new_tokens=2)
        assert client.generate("x", max_new_tokens=5).read() == text_of("x", max_new_tokens=5)
        assert client.stats()["ring_deaths"] == 1


def test_a_ring_that_dies_while_idle_is_started_again(tmp_path):
    sessions = [DeadSession(), FastSession()]
    with served(tmp_path, lambda: sessions.pop(0)) as server, Client(server.endpoint) as client:
        server.until(lambda: server.scheduler.observer.ring_deaths == 1)
        assert client.generate("x", max_new_tokens=5).read() == text_of("x", max_new_tokens=5)


DEFAULTS = Decoding(temperature=0.6, top_p=0.9, top_k=7, max_new_tokens=9)


def test_what_a_request_leaves_out_is_as_configured(tmp_path):
    whole = dict(DEFAULTS)
    with served(tmp_path, defaults=DEFAULTS) as server, Client(server.endpoint) as client:
        assert client.generate("x").read() == text_of("x", **whole)
        given = {"temperature": 0, "top_k": 0}  # zero is not left out
        wanted = text_of("x", **(whole | {"temperature": 0.0, "top_k": 0}))
        assert client.generate("x", **given).read() == wanted
    with Pipeline(WarmRing(FastSession, defaults=DEFAULTS)) as pipeline:
        assert pipeline.generate("x").read() == text_of("x", **whole)


def test_three_deaths_within_a_minute_are_the_end(tmp_path):
    with served(tmp_path, DyingSession) as server, Client(server.endpoint) as client:
        for _ in range(3):
            with pytest.raises((RingError, ServingError)):
                client.generate("x", max_new_tokens=5).read()
        server.until(server.scheduler.failed.done)
        error = server.ask(server.scheduler.failed.exception)
    assert "died 3 times within 60 s" in str(error)


def test_deaths_that_are_far_apart_are_not_the_end(tmp_path):
    now = [0.0]
    with (
        served(tmp_path, DyingSession, clock=lambda: now[0]) as server,
        Client(server.endpoint) as client,
    ):
        for _ in range(5):
            with pytest.raises(RingError, match="SIGKILL"):
                client.generate("x", max_new_tokens=5).read()
            now[0] += 40.0
        assert client.health().status in ("ready", "restarting", "busy")


def test_a_bug_ends_one_request_only(tmp_path, capfd):
    sessions = [BuggySession(), FastSession()]
    with served(tmp_path, lambda: sessions.pop(0)) as server, Client(server.endpoint) as client:
        with pytest.raises(ServingError, match="ZeroDivisionError"):
            client.generate("x").read()
        assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err, "who runs the server is told where"


def test_a_client_connects_again_to_a_new_server(tmp_path):
    with served(tmp_path) as first:
        client = Client(first.endpoint, timeout=5)
        assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)
    with served(tmp_path), client:
        assert client.generate("x", max_new_tokens=2).read() == text_of("x", max_new_tokens=2)


def test_a_server_that_stops_ends_open_answers(tmp_path):
    session = GatedSession()
    with served(tmp_path, lambda: session) as server:
        client = Client(server.endpoint, timeout=5)
        running, waiting = client.generate("a"), client.generate("b")
        server.until(lambda: server.scheduler.running is not None)
    with client, pytest.raises(ServerUnavailable):
        waiting.read()
    assert running.text == ""
    assert session.closed
    assert session.abandoned, "a run that does not end would hold the server up"


def test_a_job_that_the_loop_does_not_know_to_run_is_ended_too():
    session = GatedSession()

    async def stop_at_once() -> list[Event]:
        events: list[Event] = []
        scheduler = Scheduler(WarmRing(lambda: session))
        scheduler.submit(Job("client", submit(1, tokens=1000), events.append))
        assert session.started.wait(30)  # the loop stands still meanwhile
        assert scheduler.running is None
        try:
            async with asyncio.timeout(30):
                await scheduler.stop()
        finally:
            session.let(1000)
        return events

    last = asyncio.run(stop_at_once())[-1]
    assert isinstance(last, Error)
    assert last.code == "stopping"


def test_a_socket_in_another_users_directory_is_not_used(tmp_path, monkeypatch):
    foreign, link = tmp_path / "foreign", tmp_path / "link"
    foreign.mkdir()
    link.symlink_to(tmp_path)
    user = os.getuid()
    if user:
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    else:  # what is root's is trusted
        os.chown(foreign, 1, 1)
        os.chown(link, 1, 1, follow_symlinks=False)

    async def connect(endpoint: str) -> None:
        client = AsyncClient(endpoint, timeout=0.05)
        try:
            await client.health()
        finally:
            await client.close()

    for directory in (foreign, link):
        endpoint = f"ipc://{directory / 'socket'}"
        refusal = f"{directory} belongs to another user"
        with pytest.raises(UsageError, match=refusal):
            Client(endpoint, timeout=0.05)
        with pytest.raises(UsageError, match=refusal):
            asyncio.run(connect(endpoint))
        with pytest.raises(UsageError, match=refusal):
            check_endpoint(endpoint, None)


def test_nobody_there_is_said_after_the_timeout(tmp_path):
    with pytest.raises(ServerUnavailable, match="no sign of life"):
        Client(f"ipc://{tmp_path / 'nobody'}", timeout=0.05)
    with pytest.raises(ServerUnavailable, match="no sign of life"):
        Client(f"ipc://{tmp_path / 'no' / 'socket'}", timeout=0.05)
    with pytest.raises(UsageError):
        Client("carrier-pigeon://")


def test_async_clients_share_a_connection(tmp_path):
    async def talk(endpoint: str) -> list[str]:
        async with AsyncClient(endpoint) as client:
            texts = await asyncio.gather(
                *[client.generate(f"p{number}", max_new_tokens=6).read() for number in range(8)]
            )
            with pytest.raises(UsageError):
                await client.generate("x", top_p=3.0).read()
            async with client.generate("long", max_new_tokens=3000) as answer:
                assert await anext(answer) == text_of("long", max_new_tokens=1)
            chat = client.chat([{"role": "user", "content": "Hi"}], max_new_tokens=2)
            assert [piece async for piece in chat]
            assert (await client.health()).status in ("ready", "busy")
            assert (await client.stats())["generated_tokens"] >= 49
            return texts

    with served(tmp_path) as server:
        texts = asyncio.run(talk(server.endpoint))
    assert texts == [text_of(f"p{number}", max_new_tokens=6) for number in range(8)]


def test_messages_of_the_protocol_survive_the_wire():
    for message in (
        Submit(1, None, (3, 4), ({"role": "user", "content": "x"},), 1, 0.5, 1, 1.0, 2, ("a",), True, 0.0),
        Token(1, 0, None, "é", -1.0),
        Done(1, "stop", 1, 2, 0, 0.0, 0.1, 0.2),
        Waiting(1, 3),
    ):
        assert decode(encode(message)) == message
