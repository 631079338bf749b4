"""Clients of a served ring: `Client`, and `AsyncClient` for asyncio.

    with Client("ipc:///run/user/1000/flashring.sock") as client:
        for piece in client.generate("Once upon a time", max_new_tokens=50):
            print(piece, end="", flush=True)

Both do nothing but input and output; what is said to the server, and when, is `conversation.py`'s.

Errors are those of the process that runs the ring: UsageError, RingError, and those of `errors.py`.
After a lost connection the next call connects again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from typing import Any, TypeVar, Unpack

import zmq
import zmq.asyncio

from pipeline.errors import ServerUnavailable
from pipeline.serving.answer import Answer, AsyncAnswer, ChatMessage, RequestOptions
from pipeline.serving.client_messages import Done, Health, Submit, Token, Welcome
from pipeline.serving.conversation import LOST, Connect, Conversation, Send, Step, Steps, Wait
from pipeline.serving.endpoint import CurveKeys, check_server, default_endpoint
from storage.errors import UsageError

TIMEOUT = 10.0  # seconds without any sign of life; the server gives one every second
PEER_HEARTBEAT_MS, PEER_TIMEOUT_MS = 2000, 8000
HIGH_WATER = 10_000  # messages that wait here while the caller does not read
Result = TypeVar("Result")
Socket = TypeVar("Socket", bound="zmq.Socket[Any]")


def _connected(context: zmq.Context[Socket], endpoint: str, keys: CurveKeys | None) -> Socket:
    """A socket that connects to `endpoint`. Raises UsageError for one that cannot, or must not, be used."""
    if context.closed:
        raise UsageError("the client is closed")
    check_server(endpoint)
    socket = context.socket(zmq.DEALER)
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
    return socket


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
        self._keys = keys
        self._conversation = Conversation(self.endpoint, timeout)
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] | None = None
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    @property
    def server(self) -> Welcome:
        """What the server said of itself."""
        assert self._conversation.welcome is not None
        return self._conversation.welcome

    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Answer:
        """Continue a text (or token ids)."""
        return self._submit(self._conversation.submission(prompt, (), options))

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[RequestOptions]) -> Answer:
        """Answer chat messages, through the model's own template."""
        return self._submit(self._conversation.submission(None, messages, options))

    def stats(self) -> dict[str, float]:
        """The server's counters, and as `WORKER.NAME` those of the ring."""
        return self._do(self._conversation.stats(time.monotonic()))

    def health(self) -> Health:
        return self._do(self._conversation.health(time.monotonic()))

    # -- input and output ------------------------------------------------------------------------

    def _submit(self, submit: Submit) -> Answer:
        self._do(self._conversation.begin(submit, time.monotonic()))
        return Answer(self._events(submit.request), lambda: self._abandon(submit.request))

    def _events(self, request: int) -> Generator[Token | Done, None, None]:
        try:
            while event := self._do(self._conversation.event(request, time.monotonic())):
                yield event
        finally:
            self._abandon(request)

    def _abandon(self, request: int) -> None:
        self._do(self._conversation.abandon(request))

    def _do(self, steps: Steps[Result]) -> Result:
        """Do a conversation's steps; what they come to."""
        try:
            step = next(steps)
            while True:
                try:
                    self._do_one(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(time.monotonic())
        except StopIteration as end:
            result: Result = end.value
            return result

    def _do_one(self, step: Step) -> None:
        if isinstance(step, Connect):
            self._connect()
        elif isinstance(step, Send):
            self._send(step.frame)
        elif isinstance(step, Wait):
            self._wait(step.until)
        else:
            self._disconnect()

    def _connect(self) -> None:
        if self._conversation.connected:
            return
        self._disconnect()
        self._socket = _connected(self._context, self.endpoint, self._keys)
        try:
            self._do(self._conversation.greet(time.monotonic()))
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if not self._conversation.connected and self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, frame: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            raise ServerUnavailable(f"nobody reads at {self.endpoint}") from None

    def _wait(self, until: float) -> None:
        assert self._socket is not None
        left = until - time.monotonic()
        if left > 0 and self._socket.poll(max(1, int(left * 1000))):
            self._conversation.receive(self._socket.recv(), time.monotonic())

    def close(self) -> None:
        """Open answers are cancelled by the server, which sees the connection end."""
        self._conversation.lose(LOST)
        self._disconnect()
        self._context.destroy()

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
        self._keys = keys
        self._conversation = Conversation(self.endpoint, timeout)
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._news: dict[int, asyncio.Event] = {}  # by request: something has come that is waited for

    @property
    def server(self) -> Welcome:
        """What the server said of itself, once connected."""
        if self._conversation.welcome is None:
            raise UsageError("the client is not connected yet; use it as an asynchronous context manager")
        return self._conversation.welcome

    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> AsyncAnswer:
        """Continue a text (or token ids)."""
        return AsyncAnswer(self._events(self._conversation.submission(prompt, (), options)))

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[RequestOptions]) -> AsyncAnswer:
        """Answer chat messages, through the model's own template."""
        return AsyncAnswer(self._events(self._conversation.submission(None, messages, options)))

    async def stats(self) -> dict[str, float]:
        """The server's counters, and as `WORKER.NAME` those of the ring."""
        return await self._do(self._conversation.stats(time.monotonic()))

    async def health(self) -> Health:
        return await self._do(self._conversation.health(time.monotonic()))

    # -- input and output ------------------------------------------------------------------------

    async def _events(self, submit: Submit) -> AsyncGenerator[Token | Done, None]:
        await self._do(self._conversation.begin(submit, time.monotonic()))
        try:
            while event := await self._do(self._conversation.event(submit.request, time.monotonic())):
                yield event
        finally:
            await self._do(self._conversation.abandon(submit.request))

    async def _do(self, steps: Steps[Result]) -> Result:
        """Do a conversation's steps; what they come to."""
        try:
            step = next(steps)
            while True:
                try:
                    await self._do_one(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(time.monotonic())
        except StopIteration as end:
            result: Result = end.value
            return result

    async def _do_one(self, step: Step) -> None:
        if isinstance(step, Connect):
            await self._connect()
        elif isinstance(step, Send):
            await self._send(step.frame)
        elif isinstance(step, Wait):
            await self._wait(step)
        else:
            self._disconnect()

    async def _connect(self) -> None:
        async with self._connecting:
            if self._conversation.connected:
                return
            self._disconnect()
            self._socket = _connected(self._context, self.endpoint, self._keys)
            self._reader = asyncio.create_task(self._read(self._socket))
            try:
                await self._do(self._conversation.greet(time.monotonic()))
            except BaseException:
                self._disconnect()
                raise

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._tell(self._conversation.receive(await socket.recv(), time.monotonic()))

    def _disconnect(self) -> None:
        if self._conversation.connected or self._socket is None:
            return
        assert self._reader is not None
        self._reader.cancel()
        self._socket.close()
        self._socket = None
        self._tell(list(self._news))

    def _tell(self, requests: Iterable[int]) -> None:
        """Wake those who wait for them."""
        for request in requests:
            news = self._news.get(request)
            if news is not None:
                news.set()

    async def _send(self, frame: bytes) -> None:
        assert self._socket is not None
        try:
            await self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            raise ServerUnavailable(f"nobody reads at {self.endpoint}") from None

    async def _wait(self, step: Wait) -> None:
        news = self._news[step.request] = asyncio.Event()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(step.until - time.monotonic()):
                    await news.wait()
        finally:
            del self._news[step.request]

    async def close(self) -> None:
        """Open answers are cancelled by the server, which sees the connection end."""
        self._conversation.lose(LOST)
        self._disconnect()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        self._context.destroy()

    async def __aenter__(self) -> AsyncClient:
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
