"""Clients of a served ring: `Client`, and `AsyncClient` for asyncio.

    with Client("ipc:///run/user/1000/flashring.sock") as client:
        for piece in client.generate("Once upon a time", max_new_tokens=50):
            print(piece, end="", flush=True)

Errors are those of the process that runs the ring: UsageError, RingError, and those of `errors.py`.
After a lost connection the next call connects again by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Unpack

import zmq
import zmq.asyncio

from pipeline.errors import HELLO, ServerUnavailable, from_code
from pipeline.ring.codec import ProtocolError
from pipeline.serving.answer import Answer, AsyncAnswer, ChatMessage, RequestOptions, submission
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
from pipeline.serving.endpoint import CurveKeys, check_server, default_endpoint
from storage.errors import UsageError

CLIENT_NAME = "flashring-python 1"
TIMEOUT = 10.0  # seconds without any sign of life; the server gives one every second
PEER_HEARTBEAT_MS, PEER_TIMEOUT_MS = 2000, 8000
HIGH_WATER = 10_000  # messages that wait here while the caller does not read


def _open_socket(socket: zmq.Socket[Any], endpoint: str, keys: CurveKeys | None) -> None:
    socket.linger = 0
    socket.rcvhwm = HIGH_WATER
    socket.setsockopt(zmq.HEARTBEAT_IVL, PEER_HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, PEER_TIMEOUT_MS)
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys.own()
        socket.curve_serverkey = keys.server_key()
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise UsageError(f"the endpoint {endpoint!r} cannot be used: {error}") from error


def _frame(message: ClientMessage, welcome: Welcome | None) -> bytes:
    """The message as the server will read it. Raises UsageError for what it would not take."""
    try:
        frame = encode(message)
        decode(frame)
    except (ProtocolError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"a parameter of the request is of the wrong kind: {error}") from error
    if welcome is not None and len(frame) > welcome.max_message:
        raise UsageError(f"the request has {len(frame):,} bytes, the server takes {welcome.max_message:,}")
    return frame


def _request_of(message: ClientMessage) -> int:
    request = getattr(message, "request", NO_REQUEST)
    return int(request)


class _Lost(Exception):
    """The server does not know this connection: greet again."""


class Client:
    """A connection for one thread. Several answers may be open at once."""

    def __init__(
        self, endpoint: str = "", *, timeout: float = TIMEOUT, keys: CurveKeys | None = None
    ) -> None:
        """Connects. `endpoint` defaults to that of `serve`.

        Raises ServerUnavailable when nobody answers within `timeout` seconds, ProtocolMismatch, and
        UsageError for an endpoint or keys that cannot be used.
        """
        self.endpoint = endpoint or default_endpoint()
        self.timeout = timeout
        self._keys = keys
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, deque[ClientMessage]] = {}
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] | None = None
        self._welcome: Welcome | None = None
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    @property
    def server(self) -> Welcome:
        """What the server said of itself."""
        assert self._welcome is not None
        return self._welcome

    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Answer:
        """Continue a text (or token ids)."""
        return self._submit(submission(next(self._numbers), prompt, (), options))

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[RequestOptions]) -> Answer:
        """Answer chat messages, through the model's own template."""
        return self._submit(submission(next(self._numbers), None, messages, options))

    def stats(self) -> dict[str, float]:
        """The server's counters, and as `WORKER.NAME` those of the ring."""
        answer = self._ask(AskStats(next(self._numbers)))
        assert isinstance(answer, ServerStats)
        return answer.values

    def health(self) -> Health:
        answer = self._ask(AskHealth(next(self._numbers)))
        assert isinstance(answer, Health)
        return answer

    # -- requests ------------------------------------------------------------------------------

    def _submit(self, submit: Submit) -> Answer:
        first = self._ask(submit)
        if not isinstance(first, Waiting):  # an answer so soon, the acceptance unread
            self._inboxes[submit.request].appendleft(first)
        return Answer(self._events(submit.request), lambda: self._abandon(submit.request))

    def _abandon(self, request: int) -> None:
        """Cancel a request whose answer nobody reads to its end."""
        if self._inboxes.pop(request, None) is not None and self._socket is not None:
            self._send(Cancel(request))

    def _ask(self, message: AskStats | AskHealth | Submit) -> ClientMessage:
        """Send, and wait for the first answer; connect (again) where that is needed."""
        self._connect()
        for last_try in (False, True):
            inbox: deque[ClientMessage] = deque()
            self._inboxes[message.request] = inbox
            try:
                self._send(message)
                answer = self._wait(inbox)
                if isinstance(answer, Error):
                    raise from_code(answer.code, answer.message)
                return answer
            except _Lost:
                self._inboxes.pop(message.request, None)
                if last_try:
                    raise ServerUnavailable("the server forgets this connection") from None
                self._disconnect()
                self._connect()
            except BaseException:
                self._inboxes.pop(message.request, None)
                raise
            finally:
                if not isinstance(message, Submit):
                    self._inboxes.pop(message.request, None)
        raise AssertionError("unreachable")

    def _events(self, request: int) -> Generator[Token | Done, None, None]:
        inbox = self._inboxes.get(request)
        if inbox is None:
            return  # closed before it began
        try:
            while True:
                message = self._wait(inbox)
                if isinstance(message, Error):
                    del self._inboxes[request]
                    raise from_code(message.code, message.message)
                if isinstance(message, Done):
                    del self._inboxes[request]
                    yield message
                    return
                if isinstance(message, Token):
                    yield message
        except (_Lost, ServerUnavailable) as error:
            self._inboxes.pop(request, None)
            self._disconnect()
            raise ServerUnavailable(str(error)) from None
        finally:
            self._abandon(request)

    # -- the connection ------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._socket is not None:
            return
        if self._context.closed:
            raise UsageError("the client is closed")
        check_server(self.endpoint)
        self._socket = self._context.socket(zmq.DEALER)
        _open_socket(self._socket, self.endpoint, self._keys)
        inbox = self._inboxes.setdefault(NO_REQUEST, deque())
        inbox.clear()
        self._send(Hello(CLIENT_PROTOCOL_VERSION, CLIENT_NAME))
        try:
            answer = self._wait(inbox)
            if isinstance(answer, Error):
                raise from_code(answer.code, answer.message)
            assert isinstance(answer, Welcome)
        except BaseException:
            self._disconnect()
            raise
        self._welcome = answer

    def _disconnect(self) -> None:
        """Drop the connection; answers that are open end with ServerUnavailable."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for inbox in self._inboxes.values():
            inbox.append(Error(NO_REQUEST, "stopping", "the connection was lost"))

    def _send(self, message: ClientMessage) -> None:
        if self._socket is None:
            raise ServerUnavailable("the connection was lost")
        frame = _frame(message, self._welcome)
        try:
            self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            raise ServerUnavailable(f"nobody reads at {self.endpoint}") from None

    def _wait(self, inbox: deque[ClientMessage]) -> ClientMessage:
        """The next message of one inbox; those for others go to theirs."""
        deadline = time.monotonic() + self.timeout
        while not inbox:
            if self._socket is None:
                raise ServerUnavailable("the connection was lost")
            left = deadline - time.monotonic()
            if left <= 0 or not self._socket.poll(max(1, int(left * 1000))):
                raise ServerUnavailable(f"no sign of life from {self.endpoint} for {self.timeout:g} s")
            message = decode(self._socket.recv())
            if isinstance(message, Error) and message.code == HELLO:
                raise _Lost(message.message)
            box = self._inboxes.get(_request_of(message))
            if box is not None:  # else: of an answer that was closed
                box.append(message)
                deadline = time.monotonic() + self.timeout
        return inbox.popleft()

    def close(self) -> None:
        """Open answers are cancelled by the server, which sees the connection end."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio: many tasks may use one. Use as an asynchronous context manager."""

    def __init__(
        self, endpoint: str = "", *, timeout: float = TIMEOUT, keys: CurveKeys | None = None
    ) -> None:
        """Connects on entry, or with the first request; the errors are those of `Client`."""
        self.endpoint = endpoint or default_endpoint()
        self.timeout = timeout
        self._keys = keys
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, asyncio.Queue[ClientMessage]] = {}
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._welcome: Welcome | None = None

    @property
    def server(self) -> Welcome:
        """What the server said of itself, once connected."""
        if self._welcome is None:
            raise UsageError("the client is not connected yet; use it as an asynchronous context manager")
        return self._welcome

    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> AsyncAnswer:
        """Continue a text (or token ids)."""
        return AsyncAnswer(self._events(submission(next(self._numbers), prompt, (), options)))

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[RequestOptions]) -> AsyncAnswer:
        """Answer chat messages, through the model's own template."""
        return AsyncAnswer(self._events(submission(next(self._numbers), None, messages, options)))

    async def stats(self) -> dict[str, float]:
        """The server's counters, and as `WORKER.NAME` those of the ring."""
        answer = await self._ask(AskStats(next(self._numbers)))
        assert isinstance(answer, ServerStats)
        return answer.values

    async def health(self) -> Health:
        answer = await self._ask(AskHealth(next(self._numbers)))
        assert isinstance(answer, Health)
        return answer

    # -- requests ------------------------------------------------------------------------------

    async def _ask(self, message: AskStats | AskHealth | Submit) -> ClientMessage:
        for last_try in (False, True):
            await self._connect()
            inbox = self._inboxes[message.request] = asyncio.Queue()
            try:
                await self._send(message)
                answer = await self._wait(inbox)
            except BaseException:
                self._inboxes.pop(message.request, None)
                raise
            if not isinstance(message, Submit):
                self._inboxes.pop(message.request, None)
            if not isinstance(answer, Error):
                return answer
            self._inboxes.pop(message.request, None)
            if answer.code != HELLO or last_try:
                raise from_code(answer.code, answer.message)
            self._disconnect()
        raise AssertionError("unreachable")

    async def _events(self, submit: Submit) -> AsyncGenerator[Token | Done, None]:
        first = await self._ask(submit)
        inbox = self._inboxes[submit.request]
        ended = False
        try:
            message: ClientMessage = first
            while True:
                if isinstance(message, Error):
                    ended = True
                    raise from_code(message.code, message.message)
                ended = isinstance(message, Done)
                if isinstance(message, Token | Done):
                    yield message
                if ended:
                    return
                message = await self._wait(inbox)
        except ServerUnavailable:
            ended = True
            self._disconnect()
            raise
        finally:
            self._inboxes.pop(submit.request, None)
            if not ended and self._socket is not None:
                await self._send(Cancel(submit.request))

    # -- the connection ------------------------------------------------------------------------

    async def _connect(self) -> None:
        async with self._connecting:
            if self._socket is not None:
                return
            if self._context.closed:
                raise UsageError("the client is closed")
            check_server(self.endpoint)
            socket = self._context.socket(zmq.DEALER)
            _open_socket(socket, self.endpoint, self._keys)
            self._socket = socket
            inbox = self._inboxes[NO_REQUEST] = asyncio.Queue()
            self._reader = asyncio.create_task(self._read(socket))
            try:
                await self._send(Hello(CLIENT_PROTOCOL_VERSION, CLIENT_NAME))
                answer = await self._wait(inbox)
                if isinstance(answer, Error):
                    raise from_code(answer.code, answer.message)
                assert isinstance(answer, Welcome)
            except BaseException:
                self._disconnect()
                raise
            self._welcome = answer

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = decode(await socket.recv())
            inbox = self._inboxes.get(_request_of(message))
            if inbox is not None:
                inbox.put_nowait(message)

    def _disconnect(self) -> None:
        """Drop the connection; answers that are open end with ServerUnavailable."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for inbox in self._inboxes.values():
            inbox.put_nowait(Error(NO_REQUEST, "stopping", "the connection was lost"))

    async def _send(self, message: ClientMessage) -> None:
        if self._socket is None:
            raise ServerUnavailable("the connection was lost")
        frame = _frame(message, self._welcome)
        try:
            await self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            raise ServerUnavailable(f"nobody reads at {self.endpoint}") from None

    async def _wait(self, inbox: asyncio.Queue[ClientMessage]) -> ClientMessage:
        try:
            async with asyncio.timeout(self.timeout):
                return await inbox.get()
        except TimeoutError:
            raise ServerUnavailable(f"no sign of life from {self.endpoint} for {self.timeout:g} s") from None

    async def close(self) -> None:
        """Open answers are cancelled by the server, which sees the connection end."""
        reader = self._reader
        self._disconnect()
        if reader is not None:
            await asyncio.gather(reader, return_exceptions=True)
        self._context.term()

    async def __aenter__(self) -> AsyncClient:
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
