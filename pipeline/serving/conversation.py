"""What a client says to a server, and when, without a socket: frames in, frames out.

A conversation's methods are generators of steps: it yields what is to be done (`Connect`, `Send`,
`Wait`, `Disconnect`), and is sent the instant at which that was done; its return value is the
answer. Frames that arrive meanwhile go to `receive`. `client.py` does the steps, once with blocking
calls and once with asyncio; whatever goes wrong in a step is thrown into the generator.

Instants are seconds of any clock that does not go back. Several requests may be open at once.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.errors import HELLO, STOPPING, ServerUnavailable, from_code
from pipeline.ring.codec import ProtocolError
from pipeline.serving.answer import ChatMessage, RequestOptions, submission
from pipeline.serving.client_messages import (
    CLIENT_PROTOCOL_VERSION,
    NO_REQUEST,
    AskHealth,
    AskStats,
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
from storage.errors import UsageError

CLIENT_NAME = "flashring-python 1"
LOST = "the connection was lost"


@dataclass(frozen=True, slots=True)
class Connect:
    """Unless the conversation is `connected`, open a socket and do the steps of `greet`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send this frame. Raises ServerUnavailable where it cannot be."""

    frame: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Until more has come for `request`, or until an instant, whichever is first. It may end sooner."""

    request: int
    until: float


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Unless the conversation is `connected`, close the socket: nobody listens any more."""


Step = Connect | Send | Wait | Disconnect
Result = TypeVar("Result")
Steps = Generator[Step, float, Result]


@dataclass(slots=True)
class _Inbox:
    """What has come for one request and was not taken yet."""

    messages: deque[ClientMessage] = field(default_factory=deque)
    lost: bool = False  # its connection is gone; the last message says so


class Conversation:
    """One client's side of the protocol, over one connection at a time."""

    def __init__(self, endpoint: str, timeout: float) -> None:
        """`endpoint` is for sentences alone; `timeout`: seconds without any sign of life."""
        self.connected = False
        self.welcome: Welcome | None = None  # of the latest connection
        self._endpoint = endpoint
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, _Inbox] = {}
        self._heard = -math.inf  # instant of the last sign of life

    # -- what may be asked ----------------------------------------------------------------------

    def submission(
        self, prompt: str | Sequence[int] | None, messages: Sequence[ChatMessage], options: RequestOptions
    ) -> Submit:
        """A request with a number of its own, for `begin`."""
        return submission(next(self._numbers), prompt, messages, options)

    def begin(self, submit: Submit, now: float) -> Steps[None]:
        """Send a request; done when it is accepted, and its events can be taken. Raises what refuses it."""
        inbox = yield from self._open(submit, now)
        if isinstance(inbox.messages[0], Waiting):  # else an answer so soon, the acceptance unread
            inbox.messages.popleft()

    def event(self, request: int, now: float) -> Steps[Token | Done | None]:
        """The next event of an answer; after `Done` there is none. None for one that was abandoned.

        Raises what ends the answer.
        """
        inbox = self._inboxes.get(request)
        if inbox is None:
            return None
        try:
            while True:
                message = yield from self._next(request, inbox, now)
                if isinstance(message, Error):
                    raise _error(message)
                if isinstance(message, Done):
                    del self._inboxes[request]
                if isinstance(message, Token | Done):
                    return message
        except ServerUnavailable:
            self._inboxes.pop(request, None)
            if not inbox.lost:  # else another connection may be open by now
                self.lose(LOST)
            yield Disconnect()
            raise
        except Exception:
            self._inboxes.pop(request, None)
            raise

    def abandon(self, request: int) -> Steps[None]:
        """Cancel an answer that nobody reads to its end; nothing for one that has ended."""
        inbox = self._inboxes.pop(request, None)
        if inbox is not None and not inbox.lost:
            yield self._send(Cancel(request))

    def stats(self, now: float) -> Steps[dict[str, float]]:
        answer = yield from self._ask(AskStats(next(self._numbers)), now)
        assert isinstance(answer, ServerStats)
        return answer.values

    def health(self, now: float) -> Steps[Health]:
        answer = yield from self._ask(AskHealth(next(self._numbers)), now)
        assert isinstance(answer, Health)
        return answer

    # -- the connection -------------------------------------------------------------------------

    def greet(self, now: float) -> Steps[None]:
        """Begin on a socket that has just been opened. Raises ProtocolMismatch and ServerUnavailable."""
        self.connected = True
        inbox = self._inboxes[NO_REQUEST] = _Inbox()
        try:
            now = yield self._send(Hello(CLIENT_PROTOCOL_VERSION, CLIENT_NAME))
            answer = yield from self._next(NO_REQUEST, inbox, now)
            if isinstance(answer, Error):
                raise _error(answer)
            assert isinstance(answer, Welcome)
        except BaseException:
            self.lose(LOST)
            raise
        finally:
            self._inboxes.pop(NO_REQUEST, None)
        self.welcome = answer

    def receive(self, frame: bytes, now: float) -> list[int]:
        """Take a frame in; the requests that have something new."""
        try:
            message = decode(frame)
        except ProtocolError as error:
            return self.lose(f"{self._endpoint} does not speak this protocol: {error}")
        if isinstance(message, Error) and message.code == HELLO:
            return self.lose(message.message, HELLO)
        request = getattr(message, "request", NO_REQUEST)
        inbox = self._inboxes.get(request)
        if inbox is None:  # of an answer that was abandoned
            return []
        self._heard = now
        inbox.messages.append(message)
        return [request]

    def lose(self, why: str, code: str = STOPPING) -> list[int]:
        """The connection is of no use any more: what is open ends with an error; the requests."""
        self.connected = False
        for inbox in self._inboxes.values():
            if not inbox.lost:
                inbox.lost = True
                inbox.messages.append(Error(NO_REQUEST, code, why))
        return list(self._inboxes)

    # -- one request ----------------------------------------------------------------------------

    def _ask(self, message: AskStats | AskHealth, now: float) -> Steps[ClientMessage]:
        """A question with one answer."""
        inbox = yield from self._open(message, now)
        del self._inboxes[message.request]
        return inbox.messages.popleft()

    def _open(self, message: AskStats | AskHealth | Submit, now: float) -> Steps[_Inbox]:
        """Send, connecting (again) where that is needed; an inbox whose first message is no error."""
        request = message.request
        for last_try in (False, True):
            now = yield Connect()
            inbox = self._inboxes[request] = _Inbox()
            try:
                now = yield self._send(message)
                first = yield from self._next(request, inbox, now)
                if not isinstance(first, Error):
                    inbox.messages.appendleft(first)
                    return inbox
                if first.code != HELLO:
                    raise _error(first)
            except BaseException:
                self._inboxes.pop(request, None)
                raise
            del self._inboxes[request]
            if not last_try:
                yield Disconnect()
        raise ServerUnavailable("the server forgets this connection")

    def _next(self, request: int, inbox: _Inbox, now: float) -> Steps[ClientMessage]:
        """The next message of an inbox. Raises ServerUnavailable after `timeout` seconds of silence."""
        started = now
        while not inbox.messages:
            until = max(started, self._heard) + self._timeout
            if now >= until:
                raise ServerUnavailable(f"no sign of life from {self._endpoint} for {self._timeout:g} s")
            now = yield Wait(request, until)
        return inbox.messages.popleft()

    def _send(self, message: ClientMessage) -> Send:
        """Raises UsageError for what the server would not take, ServerUnavailable without a connection."""
        if not self.connected:
            raise ServerUnavailable(LOST)
        try:
            frame = encode(message)
            decode(frame)  # as the server will
        except (ProtocolError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"a parameter of the request is of the wrong kind: {error}") from error
        limit = math.inf if self.welcome is None else self.welcome.max_message
        if len(frame) > limit:
            raise UsageError(f"the request has {len(frame):,} bytes, the server takes {limit:,}")
        return Send(frame)


def _error(message: Error) -> Exception:
    """The exception for an error that ends a request; a forgotten connection is a lost one."""
    return from_code(STOPPING if message.code == HELLO else message.code, message.message)
