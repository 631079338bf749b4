"""Sockets: the only file that touches ZeroMQ inside the ring.

Every worker has one inbox (PULL, bound) and pushes to others' inboxes. Compute has a second one, `control`,
for what must not wait behind its layers' parts. Addresses are file names in the ring's private directory.
Sending never blocks: what is in flight is bounded by the protocol, so a full queue is a bug and raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import zmq

from pipeline.ring.messages import Message, decode, encode

HIGH_WATER = 4096  # messages; far above what look-ahead + 1 layers can have in flight


class Channel:
    """One process's ends: its inboxes and lazily connected outgoing sockets."""

    def __init__(
        self, directory: Path, inboxes: tuple[str, ...], routes: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.routes = dict(routes or {})
        self._context = zmq.Context(io_threads=1)
        self._inboxes: dict[str, zmq.Socket[bytes]] = {}
        self._timeouts: dict[str, float | None] = {}  # of `receive`, as they were last set
        self._outgoing: dict[str, zmq.Socket[bytes]] = {}
        for name in inboxes:
            socket = self._socket(zmq.PULL)
            socket.bind(self._address(name))
            self._inboxes[name] = socket

    def _address(self, name: str) -> str:
        return f"ipc://{self.directory / name}"

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.linger = 200  # ms: enough for a last word, never a hang
        socket.sndhwm = HIGH_WATER
        socket.rcvhwm = HIGH_WATER
        return socket

    def send(self, to: str, message: Message) -> None:
        """Push a message. Raises zmq.Again if the receiver's queue is full, which is a bug.

        One thread per destination: sockets are not shared between threads.
        """
        socket = self._outgoing.get(to)
        if socket is None:
            socket = self._socket(zmq.PUSH)
            socket.immediate = False
            socket.connect(self._address(self.routes.get(to, to)))
            self._outgoing[to] = socket
        socket.send(encode(message), zmq.DONTWAIT)

    def receive(self, inbox: str, timeout: float | None = None) -> Message | None:
        """Wait up to `timeout` seconds (None: for ever) for the next message; None on time-out."""
        socket = self._inboxes[inbox]
        if timeout != self._timeouts.get(inbox):
            socket.rcvtimeo = -1 if timeout is None else int(timeout * 1000)
            self._timeouts[inbox] = timeout
        try:
            return decode(socket.recv())
        except zmq.Again:
            return None

    def on_message(self, inbox: str, handle: Callable[[Message], None]) -> None:
        """Call `handle` for every message from now on, on the running event loop.

        The loop watches the inbox's descriptor itself: pyzmq's asyncio sockets cost about 30 µs
        more a message, and a token passes through dozens of hops.
        """
        socket = self._inboxes[inbox]
        loop = asyncio.get_running_loop()

        def drain() -> None:
            # The descriptor is edge-triggered: read until nothing is left.
            while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                handle(decode(socket.recv(zmq.DONTWAIT)))

        loop.add_reader(socket.fileno(), drain)
        loop.call_soon(drain)

    def close(self) -> None:
        """Also a socket that an interrupt kept from being noted is closed: the context would wait for it."""
        self._context.destroy()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
