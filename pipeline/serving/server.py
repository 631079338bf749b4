"""The ZeroMQ front of a served ring: one ROUTER socket on the event loop.

Sending never blocks. A client that is gone, or whose queue is full because it does not read, loses
its requests at once, and the ring is free again at the next token. PROTOCOL.md, "Clients".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import zmq
import zmq.auth.thread

from pipeline.errors import HELLO, MALFORMED, SLOW, USAGE, VERSION, code_of
from pipeline.ring.codec import ProtocolError
from pipeline.serving.client_messages import (
    CLIENT_PROTOCOL_VERSION,
    NO_REQUEST,
    AskHealth,
    AskStats,
    Cancel,
    ClientMessage,
    Error,
    Health,
    Hello,
    ServerStats,
    Submit,
    SubmitStructured,
    Waiting,
    Welcome,
    decode,
    encode,
)
from pipeline.serving.endpoint import CurveKeys, check_endpoint
from pipeline.serving.scheduler import Event, Job, Scheduler
from pipeline.version import name_and_version
from storage.errors import FlashringError

HEARTBEAT = 1.0  # seconds between signs of life
MAX_MESSAGE = 1 << 20  # bytes
MAX_GREETED = 4096  # clients remembered as greeted; one that is forgotten greets again
AT_ONCE = 64  # messages handled before tokens get their turn
HIGH_WATER = 10_000  # messages for one client that wait in this process: longer than most answers
PEER_HEARTBEAT_MS, PEER_TIMEOUT_MS, HANDSHAKE_MS = 2000, 8000, 5000


class Server:
    """Listens from construction to `close`; belongs to the running event loop."""

    def __init__(
        self,
        endpoint: str,
        scheduler: Scheduler,
        *,
        model: str,
        context: int,
        keys: CurveKeys | None = None,
        heartbeat: float = HEARTBEAT,
        max_message: int = MAX_MESSAGE,
    ) -> None:
        """Raises UsageError for an endpoint that may not be used, OSError when it cannot be."""
        check_endpoint(endpoint, keys)
        self._scheduler = scheduler
        self._observer = scheduler.observer
        self._loop = asyncio.get_running_loop()
        self._welcome = Welcome(
            protocol=CLIENT_PROTOCOL_VERSION,
            server=name_and_version(),
            model=model,
            context=context,
            heartbeat=heartbeat,
            max_message=max_message,
            chat=scheduler.ring.template is not None,
        )
        self._greeted: OrderedDict[bytes, None] = OrderedDict()
        self._jobs: dict[bytes, dict[int, Job]] = {}
        self._owed: dict[bytes, set[int]] = {}  # requests lost by not reading, to be told when it reads
        self._handlers: dict[type[ClientMessage], Callable[[bytes, Any], None]] = {
            Hello: self._on_hello,
            Submit: self._on_submit,
            SubmitStructured: self._on_submit,
            Cancel: self._on_cancel,
            AskStats: self._on_ask_stats,
            AskHealth: self._on_ask_health,
        }
        self._context = zmq.Context(io_threads=1)
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        self._drain_planned = False
        try:
            self._socket = self._bind(endpoint, keys)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._loop.call_soon(self._drain)
        self._beat = self._loop.call_later(heartbeat, self._on_beat)

    # -- the socket ----------------------------------------------------------------------------

    def _bind(self, endpoint: str, keys: CurveKeys | None) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a client that is gone is an error, not a silence
        socket.setsockopt(zmq.MAXMSGSIZE, self._welcome.max_message)
        socket.setsockopt(zmq.HEARTBEAT_IVL, PEER_HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, PEER_TIMEOUT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.linger = 500  # ms: last words to clients
        socket.sndhwm = socket.rcvhwm = HIGH_WATER
        if keys is not None:
            self._secure(socket, keys)
        mask = os.umask(0o077)  # an ipc socket for this user only
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), endpoint) from error
        finally:
            os.umask(mask)
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return socket

    def _secure(self, socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
        """CURVE: only clients whose public key lies in the directory are let in."""
        public, secret = keys.own()
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(keys.peers))
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_server = True

    def _drain(self) -> None:
        """Handle what has arrived; the descriptor is edge-triggered, so until nothing is left."""
        self._drain_planned = False
        for _ in range(AT_ONCE):
            if self._socket.closed or not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._on_frames(self._socket.recv_multipart(zmq.DONTWAIT))
        self._plan_drain()

    def _plan_drain(self) -> None:
        if not self._drain_planned:
            self._drain_planned = True
            self._loop.call_soon(self._drain)

    def _send(self, client: bytes, message: ClientMessage) -> bool:
        """Send without waiting; False (and the client dropped) if it is gone or does not read."""
        try:
            self._socket.send_multipart([client, encode(message)], zmq.DONTWAIT)
        except zmq.Again:  # the client does not read
            self._owed.setdefault(client, set()).update(self._jobs.get(client, ()))
            self._drop(client)
            return False
        except zmq.ZMQError:  # EHOSTUNREACH: it is gone
            self._owed.pop(client, None)
            self._drop(client)
            return False
        finally:
            self._plan_drain()  # sending may swallow the descriptor's edge
        return True

    def _drop(self, client: bytes) -> None:
        self._greeted.pop(client, None)
        jobs = self._jobs.pop(client, {})
        if jobs:
            self._observer.dropped_clients += 1
        for job in jobs.values():
            self._scheduler.abandon(job)

    # -- messages ------------------------------------------------------------------------------

    def _on_frames(self, frames: list[bytes]) -> None:
        client = frames[0]
        try:
            if len(frames) != 2:
                raise ProtocolError(f"a message is one frame, got {len(frames) - 1}")
            message = decode(frames[1])
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} is not for servers")
        except ProtocolError as error:
            self._observer.malformed_frames += 1
            self._send(client, Error(NO_REQUEST, MALFORMED, str(error)[:200]))
            return
        if not isinstance(message, Hello | AskHealth) and client not in self._greeted:
            self._send(client, Error(_request_of(message), HELLO, "greet with Hello first"))
            return
        handler(client, message)

    def _on_hello(self, client: bytes, message: Hello) -> None:
        if message.protocol != CLIENT_PROTOCOL_VERSION:
            sentence = f"the server speaks protocol {CLIENT_PROTOCOL_VERSION}, the client {message.protocol}"
            self._send(client, Error(NO_REQUEST, VERSION, sentence))
            return
        self._greeted[client] = None
        self._greeted.move_to_end(client)
        while len(self._greeted) > MAX_GREETED:
            self._greeted.popitem(last=False)
        self._send(client, self._welcome)

    def _on_submit(self, client: bytes, message: Submit) -> None:
        jobs = self._jobs.setdefault(client, {})
        if message.request in jobs:
            self._send(
                client, Error(message.request, USAGE, f"request number {message.request} is open already")
            )
            return
        job = Job(client, message, lambda event: self._deliver(client, event))
        try:
            self._scheduler.submit(job)
        except FlashringError as error:
            if not jobs:
                del self._jobs[client]
            self._send(client, Error(message.request, code_of(error), str(error)))
            return
        jobs[message.request] = job
        self._send(client, Waiting(message.request, self._scheduler.waiting))

    def _on_cancel(self, client: bytes, message: Cancel) -> None:
        job = self._jobs.get(client, {}).get(message.request)
        if job is not None:  # else it has just ended: its Done is on the way
            self._scheduler.cancel(job)

    def _on_ask_stats(self, client: bytes, message: AskStats) -> None:
        values = self._observer.values()
        values["waiting"] = float(self._scheduler.waiting)
        for worker, counters in self._scheduler.ring.stats().items():
            values.update({f"{worker}.{name}": value for name, value in counters.items()})
        self._send(client, ServerStats(message.request, values))

    def _on_ask_health(self, client: bytes, message: AskHealth) -> None:
        self._send(client, Health(message.request, self._scheduler.status, self._scheduler.waiting))

    # -- answers -------------------------------------------------------------------------------

    def _deliver(self, client: bytes, event: Event) -> None:
        if not self._send(client, event):
            return
        job = self._jobs.get(client, {}).get(event.request)
        if job is not None and job.ended:
            del self._jobs[client][event.request]
            if not self._jobs[client]:
                del self._jobs[client]

    def _on_beat(self) -> None:
        self._beat = self._loop.call_later(self._welcome.heartbeat, self._on_beat)
        for slow in list(self._owed):
            self._tell_lost(slow)
        for job, position in self._scheduler.positions():
            client = job.client
            if isinstance(client, bytes) and self._jobs.get(client, {}).get(job.submit.request) is job:
                self._send(client, Waiting(job.submit.request, position))

    def _tell_lost(self, client: bytes) -> None:
        for request in list(self._owed[client]):
            if not self._send(client, Error(request, SLOW, "the answer was not read in time")):
                return
            self._owed[client].discard(request)
        del self._owed[client]

    def close(self) -> None:
        self._beat.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy()
        if self.endpoint.startswith("ipc://"):
            with contextlib.suppress(OSError):
                os.unlink(self.endpoint.removeprefix("ipc://"))


def _request_of(message: ClientMessage) -> int:
    request = getattr(message, "request", NO_REQUEST)
    return request if isinstance(request, int) else NO_REQUEST
