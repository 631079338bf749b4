"""Several queues that share one backlog of reads, first come, first served, guesses last.

Each reader has a queue of its own. A new set of requests is spread over the readers that have room;
what does not fit waits in the backlog, and whichever reader completes reads takes the next from
there: no queue idles while a later part is already asked for.

Completions come about twenty at a time, a thousand times a token, to a core whose caches the kernels
have filled meanwhile: every operation between a completion and the next submission is then slow, array
operations most of all. So they are prepared for a whole transfer, and what is left is plain numbers.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from storage.errors import StoreCorrupt, StoreError
from workers.prefetcher.backend import Backend, Completed
from workers.prefetcher.requests import Requests

TRY_AGAIN = (errno.EAGAIN, errno.EINTR, errno.EBUSY)
MAX_TRIES = 1000  # of one read that is refused, a millisecond apart
ERROR_TRIES = 1  # of one read that failed: a cable, a path or a bus may have, and the disk not
RETRY_SECONDS = 0.001
SERIALS = 1 << 31  # then they begin again

Describe = Callable[[int], str]  # file offset → the bundle there, for errors


@dataclass(slots=True)
class Transfer:
    """Requests on their way, and what to call when the last byte is there."""

    requests: Requests
    prepared: Any  # the same for the queues
    wanted: list[int]  # [n] bytes that each read should bring
    when_done: Callable[[], None]
    at_once: int  # most reads that a queue may have in flight when it takes another of these
    open: int  # reads not yet complete
    next: int = 0  # first read not yet submitted
    patched: dict[int, tuple[Requests, int]] = field(default_factory=dict)  # row → what it reads again, tries


@dataclass(slots=True)
class Counters:
    """Since start. Seconds, and numbers of reads."""

    busy_seconds: float = 0.0  # with at least one read in flight
    batches: int = 0  # submissions to a queue
    wakes: int = 0  # batches of completions
    retries: int = 0  # refused or short reads, submitted again
    peak_in_flight: int = 0
    in_flight: int = 0
    busy_since: float = 0.0

    def entered(self, count: int) -> None:
        if self.in_flight == 0:
            self.busy_since = time.monotonic()
        self.batches += 1
        self.in_flight += count
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def busy(self) -> float:
        """`busy_seconds` up to now."""
        return self.busy_seconds + (time.monotonic() - self.busy_since if self.in_flight else 0.0)

    def left(self, count: int) -> None:
        self.in_flight -= count
        if self.in_flight == 0:
            self.busy_seconds += time.monotonic() - self.busy_since


@dataclass(slots=True)
class Reader:
    """One queue, and how many more reads it takes."""

    backend: Backend
    idle: int


class ReaderPool:
    """`read` and `submit` requests while `run` runs."""

    def __init__(
        self,
        backends: Sequence[Backend],
        depth: int,
        size: int,
        describe: Describe,
        in_flight: int | None = None,
    ) -> None:
        """`depth` reads in flight for each backend, of a file of `size` bytes.

        With `in_flight` no more than about so many bytes, and one read for each backend.
        """
        self.counters = Counters()
        self._readers = [Reader(backend, depth) for backend in backends]
        self._depth = depth
        self._bytes_each = None if in_flight is None else in_flight // len(backends)
        self._size = size
        self._describe = describe
        self._transfers: dict[int, Transfer] = {}
        # Transfers that are not wholly submitted: those that are waited for, and guesses.
        self._backlogs: tuple[deque[Transfer], deque[Transfer]] = (deque(), deque())
        self._serial = 0
        self._turn = 0  # the reader that is offered the next transfer first
        self._drained = asyncio.Event()
        self._drained.set()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for reader in self._readers:
            reader.backend.on_completed(partial(self._unless_ended, self._arrived, reader))

    @property
    def backlog(self) -> int:
        """Reads that wait for a place in a queue."""
        transfers = (transfer for backlog in self._backlogs for transfer in backlog)
        return sum(len(transfer.wanted) - transfer.next for transfer in transfers)

    def submit(self, requests: Requests, when_done: Callable[[], None], guess: bool = False) -> None:
        """Begin; `when_done` is called on the event loop after the last byte has arrived.

        A guess is begun when nothing else waits.
        """
        count = len(requests)
        if count == 0:
            when_done()
            return
        self._serial = (self._serial + 1) % SERIALS
        prepared = self._readers[0].backend.prepare(requests, self._serial)
        at_once = self._depth
        if self._bytes_each is not None:
            at_once = max(1, self._bytes_each * count // requests.total_bytes)
        transfer = Transfer(requests, prepared, requests.lengths.tolist(), when_done, at_once, open=count)
        self._transfers[self._serial] = transfer
        self._backlogs[guess].append(transfer)
        self._drained.clear()
        share = -(-count // len(self._readers))
        self._turn = (self._turn + 1) % len(self._readers)
        for limit in (share, share * len(self._readers)):  # evenly, then wherever there is room
            for reader in self._readers[self._turn :] + self._readers[: self._turn]:
                self._fill(reader, limit)

    async def read(self, requests: Requests) -> None:
        """Submit and wait."""
        arrived = asyncio.Event()
        self.submit(requests, arrived.set)
        await arrived.wait()

    async def drained(self) -> None:
        """Wait until nothing is in flight."""
        await self._drained.wait()

    async def run(self) -> None:
        """Serve until cancelled. Raises StoreError for a read that failed, StoreCorrupt for an early end."""
        await self._ended

    async def close(self) -> None:
        self._ended.cancel()
        for reader in self._readers:
            await reader.backend.close()

    def _unless_ended(self, act: Callable[..., None], *given: Any) -> None:
        """Act; what that raises ends the pool."""
        if self._ended.done():
            return
        try:
            act(*given)
        except Exception as error:
            self._ended.set_exception(error)

    def _arrived(self, reader: Reader, completed: Completed) -> None:
        """Account for completed reads, give their places to others, tell those who waited for them."""
        self.counters.wakes += 1
        finished = []
        places = 0
        for row, serial, result in completed:
            transfer = self._transfers[serial]
            if result != transfer.wanted[row]:
                self._recover(reader, serial, row, result)
                continue
            places += 1
            transfer.open -= 1
            if transfer.open == 0:
                del self._transfers[serial]
                finished.append(transfer)
        self.counters.left(places)
        reader.idle += places
        self._fill(reader, reader.idle)
        if not self._transfers:
            self._drained.set()
        for transfer in finished:
            transfer.when_done()

    def _fill(self, reader: Reader, limit: int) -> None:
        """Give a reader up to `limit` reads of the backlog, as far as it has room."""
        limit = min(limit, reader.idle)
        while limit > 0:
            backlog = self._backlogs[0] or self._backlogs[1]
            if not backlog:
                return
            transfer = backlog[0]
            start = transfer.next
            room = min(limit, transfer.at_once - (self._depth - reader.idle))
            if room <= 0:
                return
            stop = min(start + room, len(transfer.wanted))
            if stop == len(transfer.wanted):
                backlog.popleft()
            transfer.next = stop
            limit -= stop - start
            reader.idle -= stop - start
            self.counters.entered(stop - start)
            reader.backend.submit(transfer.prepared, start, stop)

    def _recover(self, reader: Reader, serial: int, row: int, result: int) -> None:
        """Read again what was refused or came short. Raises for what will not get better."""
        self.counters.retries += 1
        transfer = self._transfers[serial]
        requests, index, tries = transfer.requests, row, 0
        if row in transfer.patched:
            (requests, tries), index = transfer.patched[row], 0
        offset = int(requests.offsets[index])
        if result < 0:
            most = MAX_TRIES if -result in TRY_AGAIN else ERROR_TRIES if -result == errno.EIO else 0
            if tries >= most:
                raise StoreError(f"reading {self._describe(offset)} failed: {os.strerror(-result)}")
            rest, tries = requests.remainder(index, 0), tries + 1
        else:
            if result == 0 or offset + result >= self._size:
                raise StoreCorrupt(f"reading {self._describe(offset + result)} met an unexpected end of file")
            rest, tries = requests.remainder(index, result), 0
        transfer.patched[row] = (rest, tries)
        transfer.wanted[row] = int(rest.lengths[0])
        again = partial(reader.backend.submit, reader.backend.prepare(rest, serial, row), 0, 1)
        if result < 0:
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._unless_ended, again)
        else:
            again()
