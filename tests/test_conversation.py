"""What a client says, step by step, without a socket: the test is the network and the clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from pipeline.errors import HELLO, ProtocolMismatch, QueueFull, ServerUnavailable
from pipeline.serving.client_messages import (
    CLIENT_PROTOCOL_VERSION,
    NO_REQUEST,
    AskHealth,
    Cancel,
    ClientMessage,
    Done,
    Error,
    Health,
    Hello,
    ServerStats,
    Submit,
    Token,
    Waiting,
    Welcome,
    decode,
    encode,
)
from pipeline.serving.conversation import (
    CLIENT_NAME,
    Connect,
    Conversation,
    Disconnect,
    Send,
    Step,
    Steps,
    Wait,
)
from storage.errors import UsageError

Result = TypeVar("Result")
FROZEN = Path(__file__).resolve().parent / "frozen"  # what version 0.1.0 sent and was sent
TIMEOUT = 10.0
WELCOME = Welcome(CLIENT_PROTOCOL_VERSION, "flashring", "model", 128, 1.0, 1000, True)
GREETING = [Hello(CLIENT_PROTOCOL_VERSION, CLIENT_NAME)]


class Network:
    """Does the steps of a conversation: notes what is sent, and answers as `server` does."""

    def __init__(self, server: Callable[[ClientMessage], list[ClientMessage]]) -> None:
        self.talk = Conversation("ipc://nowhere", TIMEOUT)
        self.now = 100.0
        self.server = server
        self.sent: list[ClientMessage] = []
        self.frames: list[bytes] = []  # the same
        self.connections = 0
        self.closed = 0
        self.coming: list[ClientMessage | float] = []  # what the next waits bring: a message, or seconds

    def do(self, steps: Steps[Result]) -> Result:
        try:
            step = next(steps)
            while True:
                try:
                    self._do_one(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(self.now)
        except StopIteration as end:
            return end.value

    def _do_one(self, step: Step) -> None:
        if isinstance(step, Connect):
            if not self.talk.connected:
                self.connections += 1
                self.do(self.talk.greet(self.now))
        elif isinstance(step, Send):
            message = decode(step.frame)
            self.sent.append(message)
            self.frames.append(step.frame)
            self.coming += self.server(message)
        elif isinstance(step, Wait):
            said = self.coming.pop(0) if self.coming else step.until - self.now
            if isinstance(said, float):
                self.now = min(self.now + said, step.until)
            else:
                self.talk.receive(encode(said), self.now)
        else:
            assert step == Disconnect()
            self.closed += not self.talk.connected

    def begin(self, prompt: str = "x") -> int:
        return self.submit(self.talk.submission(prompt, (), {"max_new_tokens": 2}))

    def submit(self, submit: Submit) -> int:
        self.do(self.talk.begin(submit, self.now))
        return submit.request

    def event(self, request: int) -> Token | Done | None:
        return self.do(self.talk.event(request, self.now))


def polite(message: ClientMessage) -> list[ClientMessage]:
    """Accepts everything, and leaves the answers to the test."""
    if isinstance(message, Hello):
        return [WELCOME]
    if isinstance(message, Submit):
        return [Waiting(message.request, 0)]
    if isinstance(message, AskHealth):
        return [Health(message.request, "ready", 0)]
    return []


def token(request: int, index: int = 0) -> Token:
    return Token(request, index, 5, "a", -1.0)


def done(request: int) -> Done:
    return Done(request, "length", 1, 2, 0, 0.0, 0.1, 0.2)


@pytest.fixture
def net() -> Network:
    return Network(polite)


def test_a_request_is_greeted_for_accepted_and_answered(net):
    request = net.begin("Once")
    assert net.talk.welcome == WELCOME
    asked = net.sent[1]
    assert isinstance(asked, Submit)
    assert net.sent[:1] == GREETING
    assert (asked.prompt, asked.max_new_tokens, asked.temperature, asked.seed) == ("Once", 2, None, 0)
    net.coming += [token(request), Waiting(request, 0), token(request, 1), done(request)]
    assert [net.event(request) for _ in range(4)] == [token(request), token(request, 1), done(request), None]
    net.do(net.talk.abandon(request))
    assert len(net.sent) == 2, "what has ended is not cancelled"
    assert net.connections == 1


def test_the_frames_are_those_of_version_0_1():
    recorded = json.loads((FROZEN / "conversations.json").read_text(encoding="utf-8"))
    (steps,) = [one["steps"] for one in recorded if one["name"] == "pipeline.Client"]
    replies = iter([[decode(bytes.fromhex(reply)) for reply in step["replies"]] for step in steps])
    net = Network(lambda message: next(replies))
    submission = net.talk.submission
    net.do(net.talk.health(net.now))
    for prompt, messages, options in (
        ("Once upon a time", (), {"max_new_tokens": 4}),
        (
            [65, 66, 67],
            (),
            {
                "max_new_tokens": 3,
                "temperature": 1,
                "top_k": 5,
                "top_p": 1,
                "seed": 8,
                "stop": "zz",
                "deadline": 60,
            },
        ),
        (None, [{"role": "user", "content": "Hi"}], {"max_new_tokens": 2, "ignore_eos": True}),
    ):
        request = net.submit(submission(prompt, messages, options))
        while net.event(request) is not None:
            pass
    request = net.submit(submission("Once", (), {"top_p": 2.0}))
    with pytest.raises(UsageError, match="top_p"):
        net.event(request)
    net.do(net.talk.stats(net.now))
    assert [frame.hex() for frame in net.frames] == [step["sent"] for step in steps]


def test_an_answer_may_come_before_its_acceptance(net):
    net.server = lambda message: [token(2)] if isinstance(message, Submit) else polite(message)
    net.do(net.talk.health(net.now))
    assert net.begin() == 2
    assert net.event(2) == token(2)


def test_answers_that_are_open_at_once_have_their_own_events(net):
    first, second = net.begin(), net.begin()
    net.coming += [token(first), token(second), token(first, 1), done(first)]
    assert net.event(second) == token(second)
    assert [net.event(first) for _ in range(3)] == [token(first), token(first, 1), done(first)]


def test_an_abandoned_answer_is_cancelled_once_and_its_rest_ignored(net):
    request = net.begin()
    for _ in range(2):
        net.do(net.talk.abandon(request))
    assert net.sent[2:] == [Cancel(request)]
    net.coming += [token(request)]
    assert net.do(net.talk.health(net.now)).status == "ready"
    assert net.event(request) is None


def test_health_and_stats_have_one_answer(net):
    net.server = lambda message: (
        polite(message) or [ServerStats(message.request, {"waiting": 1.0})]  # type: ignore[attr-defined]
    )
    assert net.do(net.talk.health(net.now)) == Health(1, "ready", 0)
    assert net.do(net.talk.stats(net.now)) == {"waiting": 1.0}


def test_a_refusal_is_the_servers_own_error(net):
    net.server = lambda message: (
        [Error(message.request, "queue-full", "2 wait")] if isinstance(message, Submit) else polite(message)
    )
    with pytest.raises(QueueFull, match="2 wait"):
        net.begin()
    assert net.talk.connected


def test_an_error_ends_an_answer_and_not_the_connection(net):
    request, other = net.begin(), net.begin()
    net.coming += [Error(request, "deadline", "late"), token(other)]
    with pytest.raises(Exception, match="late"):
        net.event(request)
    assert net.event(request) is None
    assert net.event(other) == token(other)
    assert net.connections == 1


def test_another_version_is_refused(net):
    net.server = lambda message: [Error(NO_REQUEST, "version", "the server speaks 2")]
    with pytest.raises(ProtocolMismatch, match="speaks 2"):
        net.begin()
    assert not net.talk.connected


def test_silence_is_measured_from_the_last_sign_of_life_of_any_request(net):
    first, second = net.begin(), net.begin()
    net.coming += [6.0, Waiting(second, 1), 6.0, Waiting(first, 0), 6.0, token(first)]
    assert net.event(first) == token(first)
    before = net.now
    with pytest.raises(ServerUnavailable, match="no sign of life from ipc://nowhere for 10 s"):
        net.event(first)
    assert net.now == before + TIMEOUT
    assert net.closed == 1
    with pytest.raises(ServerUnavailable, match="the connection was lost"):
        net.event(second)
    assert net.closed == 2, "the socket stays closed"


def test_nobody_there_is_said_after_the_timeout(net):
    net.server = lambda message: []
    with pytest.raises(ServerUnavailable, match="no sign of life"):
        net.begin()
    assert net.now == 100.0 + TIMEOUT
    assert not net.talk.connected


def test_a_forgotten_connection_is_greeted_again_and_the_request_repeated(net):
    old = net.begin()
    forgets = [True]

    def forgetful(message: ClientMessage) -> list[ClientMessage]:
        if isinstance(message, Submit) and forgets.pop():
            forgets.append(False)
            return [Error(message.request, HELLO, "greet with Hello first")]
        return polite(message)

    net.server = forgetful
    request = net.begin("again")
    assert net.connections == 2
    assert [type(one) for one in net.sent] == [Hello, Submit, Submit, Hello, Submit]
    assert net.sent[2] == net.sent[4]
    with pytest.raises(ServerUnavailable, match="greet"):
        net.event(old)
    assert net.talk.connected, "the old answer's end is not the new connection's"
    net.coming += [token(request)]
    assert net.event(request) == token(request)


def test_a_server_that_forgets_again_and_again_is_given_up(net):
    net.server = lambda message: (
        [WELCOME] if isinstance(message, Hello) else [Error(NO_REQUEST, HELLO, "greet with Hello first")]
    )
    with pytest.raises(ServerUnavailable, match="forgets this connection"):
        net.begin()
    assert net.connections == 2


def test_after_a_loss_the_next_call_connects_again(net):
    request = net.begin()
    assert net.talk.lose("gone") == [request]
    with pytest.raises(ServerUnavailable, match="gone"):
        net.event(request)
    net.do(net.talk.abandon(request))
    assert net.do(net.talk.health(net.now)).status == "ready"
    assert net.connections == 2
    assert not any(isinstance(one, Cancel) for one in net.sent)


def test_what_no_server_would_take_is_not_sent(net):
    net.do(net.talk.health(net.now))
    sent = len(net.sent)
    with pytest.raises(UsageError, match="wrong kind"):
        net.do(net.talk.begin(net.talk.submission("x", (), {"seed": "one"}), net.now))
    with pytest.raises(UsageError, match=r"the server takes 1,000"):
        net.begin("x" * 2000)
    assert len(net.sent) == sent
    assert net.talk.lose("") == [], "nothing of it is left"


def test_what_is_no_message_ends_everything(net):
    request = net.begin()
    assert net.talk.receive(b"\xc1", net.now) == [request]
    with pytest.raises(ServerUnavailable, match="does not speak this protocol"):
        net.event(request)


def test_a_frame_that_cannot_be_sent_opens_nothing(net):
    net.do(net.talk.health(net.now))

    def deaf(message: ClientMessage) -> list[ClientMessage]:
        raise ServerUnavailable("nobody reads")

    net.server = deaf
    with pytest.raises(ServerUnavailable, match="nobody reads"):
        net.begin()
    assert net.talk.lose("") == []
