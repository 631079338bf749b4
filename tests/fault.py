"""A worker with a fault, as a program of its own: `python fault.py WORKER FAULT…`.

It stands in for the worker's program (`Session(…, programs=…)`), does what that does, and misbehaves where it
is told to. Faults of messages are `WHAT:MESSAGE:N`, at the Nth message of that kind that this worker sends
(for `die` and `hang` also of a kind that it receives):

    die        it kills itself instead          hang    it does nothing any more
    lose       the message is not sent          twice   it is sent twice
    delay      it is sent half a second later

`die:start` does so before the worker is ready. Of the prefetcher's reads, all from the first on, or `…-once`
one alone:

    short      a sector instead of all          eio     an input/output error
    eagain     refused for now                  flip    a bit of what came is another
    slow       it comes a while later           never   it does not come

Of shared memory: `table`, in the cache, writes a read table with an impossible neuron in it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.ring import process
from pipeline.ring.channel import Channel
from pipeline.ring.messages import Message
from pipeline.ring.process import Worker
from pipeline.ring.segments import ID
from workers.prefetcher.backend import Backend, Completed
from workers.prefetcher.requests import Requests

DELAY = 0.5  # seconds
SLOW = 3.0  # seconds
READS = ("short", "eio", "eagain", "flip", "slow", "never")


def program(worker: str, *faults: str) -> dict[str, list[str]]:
    """For `Session(…, programs=…)`."""
    return {worker: [sys.executable, str(Path(__file__).resolve()), worker, *faults]}


class Faults:
    """What this process was told to do wrong; state that its parts share."""

    def __init__(self) -> None:
        self.messages: dict[tuple[str, int], str] = {}  # (kind, how manieth) → what
        self.reads = ""
        self.start = ""
        self.table = False
        self.seen: Counter[str] = Counter()
        self.worker: Worker | None = None

    def take(self, words: list[str]) -> None:
        for word in words:
            what, *rest = word.split(":")
            if rest == ["start"]:
                self.start = what
            elif rest:
                self.messages[rest[0], int(rest[1])] = what
            elif what == "table":
                self.table = True
            else:
                assert what.removesuffix("-once") in READS, what
                self.reads = what

    def of(self, message: Message) -> str:
        """What to do with this message; nothing of most."""
        kind = type(message).__name__
        self.seen[kind] += 1
        return self.messages.get((kind, self.seen[kind]), "")


FAULTS = Faults()


def end(how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        while True:
            time.sleep(3600)


class FaultyChannel(Channel):
    """Loses, doubles and delays messages, and ends its process at one."""

    def send(self, to: str, message: Message) -> None:
        what = FAULTS.of(message)
        end(what)
        if what == "delay":
            time.sleep(DELAY)
        if what == "lose":
            return
        if FAULTS.table and type(message).__name__ == "ReadBundles" and FAULTS.worker is not None:
            FAULTS.worker.segments.reads[message.layer, ID, message.start] ^= 1 << 30  # type: ignore[attr-defined]
        super().send(to, message)
        if what == "twice":
            super().send(to, message)

    def receive(self, inbox: str, timeout: float | None = None) -> Message | None:
        message = super().receive(inbox, timeout)
        if message is not None:
            end(FAULTS.of(message))
        return message

    def on_message(self, inbox: str, handle: Callable[[Message], None]) -> None:
        def heard(message: Message) -> None:
            end(FAULTS.of(message))
            handle(message)

        super().on_message(inbox, heard)


class FaultyQueue:
    """A queue of reads between the prefetcher's and the disk's."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.fault = FAULTS.reads
        self.wrong = 0
        self.memory: dict[tuple[int, int], int] = {}  # (serial, row) → address of the first byte

    def on_completed(self, tell: Callable[[Completed], None]) -> None:
        self.inner.on_completed(partial(self._arrived, tell))

    def _arrived(self, tell: Callable[[Completed], None], completed: Completed) -> None:
        loop = asyncio.get_running_loop()
        for row, serial, result in completed:
            what = self._fault()
            if what == "never":
                continue
            answer = [(row, serial, self._spoiled(what, row, serial, result))]
            if what == "slow":
                loop.call_later(SLOW, tell, answer)
            else:
                tell(answer)

    def _fault(self) -> str:
        once = self.fault.endswith("-once")
        if not self.fault or (once and self.wrong):
            return ""
        self.wrong += 1
        return self.fault.removesuffix("-once")

    def _spoiled(self, what: str, row: int, serial: int, result: int) -> int:
        match what:
            case "short":
                return min(result, 512)
            case "eio":
                return -errno.EIO
            case "eagain":
                return -errno.EAGAIN if self.wrong % 3 else result
            case "flip":
                byte = (ctypes.c_uint8).from_address(self.memory[serial, row] + 33)
                byte.value ^= 8
        return result

    def prepare(self, requests: Requests, serial: int, row: int = 0) -> Any:
        for index in range(len(requests)):
            self.memory[serial, row + index] = requests.vector(index)[0][0]
        return self.inner.prepare(requests, serial, row)

    def submit(self, prepared: Any, start: int, stop: int) -> None:
        self.inner.submit(prepared, start, stop)

    async def close(self) -> None:
        await self.inner.close()


def main(name: str, words: list[str]) -> None:
    FAULTS.take(words)
    module = importlib.import_module(f"workers.{name}.__main__")
    inboxes = ("control",) if name == "compute" else (name,)
    end(FAULTS.start)
    if name == "prefetcher":
        process.run_on_loop(name, inboxes, partial(module.main, through=FaultyQueue), FaultyChannel)
        return

    def known(worker: Worker) -> Any:
        FAULTS.worker = worker
        return module.main(worker)

    if name == "compute":
        process.run_on_loop(name, inboxes, known, FaultyChannel)
    else:
        process.run(name, inboxes, known, FaultyChannel)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
