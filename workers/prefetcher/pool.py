"""Several queues that share one backlog of reads, first come, first served, guesses last.

Each reader is an asyncio task with a queue of its own. A new set of requests is spread over the
readers that have room; what does not fit waits in the backlog, and whichever reader completes reads
takes the next from there: no queue idles while a later part is already asked for.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.errors import StoreCorrupt, StoreError
from workers.prefetcher.backend import Backend, Results, Tags
from workers.prefetcher.requests import Requests

TRY_AGAIN = (errno.EAGAIN, errno.EINTR, errno.EBUSY)
MAX_TRIES = 1000  # of one read that is refused, a millisecond apart
RETRY_SECONDS = 0.001

Describe = Callable[[int], str]  # file offset → the bundle there, for errors


@dataclass(slots=True)
class Transfer:
    """Requests on their way, and what to call when the last byte is there."""

    requests: Requests
    when_done: Callable[[], None]
    next: int = 0  # first read not yet submitted
    open: int = 0  # reads not yet complete


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
    """One queue, and which read each of its tags stands for."""

    backend: Backend
    depth: int
    free: Tags = field(init=False)  # [depth], the first `idle` of them are free tags
    idle: int = field(init=False)
    serial: Tags = field(init=False)  # [depth] of the tag's transfer
    index: Tags = field(init=False)  # [depth] of the tag's read in its transfer
    wanted: Tags = field(init=False)  # [depth] bytes that its submission should bring
    patched: dict[int, tuple[Requests, int]] = field(default_factory=dict)  # tag → what it reads again, tries

    def __post_init__(self) -> None:
        self.free = np.arange(self.depth)
        self.idle = self.depth
        self.serial, self.index, self.wanted = (np.zeros(self.depth, np.int64) for _ in range(3))

    def take(self, serial: int, transfer: Transfer, count: int) -> None:
        """Submit the next `count` reads of a transfer."""
        start, stop = transfer.next, transfer.next + count
        self.idle -= count
        tags = self.free[self.idle : self.idle + count].copy()
        self.serial[tags] = serial
        self.index[tags] = np.arange(start, stop)
        self.wanted[tags] = transfer.requests.lengths[start:stop]
        transfer.next = stop
        self.backend.submit(transfer.requests, start, stop, tags)

    def give_back(self, tags: Tags) -> None:
        self.free[self.idle : self.idle + tags.size] = tags
        self.idle += tags.size


class ReaderPool:
    """`read` and `submit` requests while `run` runs."""

    def __init__(self, backends: Sequence[Backend], depth: int, size: int, describe: Describe) -> None:
        """`depth` reads in flight for each backend, of a file of `size` bytes."""
        self.counters = Counters()
        self._readers = [Reader(backend, depth) for backend in backends]
        self._size = size
        self._describe = describe
        self._transfers: dict[int, Transfer] = {}
        # Serials of transfers that are not wholly submitted: those that are waited for, and guesses.
        self._backlogs: tuple[deque[int], deque[int]] = (deque(), deque())
        self._serial = 0
        self._turn = 0  # the reader that is offered the next transfer first
        self._retries: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()
        self._drained.set()

    @property
    def backlog(self) -> int:
        """Reads that wait for a place in a queue."""
        transfers = (self._transfers[serial] for backlog in self._backlogs for serial in backlog)
        return sum(len(transfer.requests) - transfer.next for transfer in transfers)

    def submit(self, requests: Requests, when_done: Callable[[], None], guess: bool = False) -> None:
        """Begin; `when_done` is called on the event loop after the last byte has arrived.

        A guess is begun when nothing else waits.
        """
        if len(requests) == 0:
            when_done()
            return
        self._serial += 1
        self._transfers[self._serial] = Transfer(requests, when_done, open=len(requests))
        self._backlogs[guess].append(self._serial)
        self._drained.clear()
        share = -(-len(requests) // len(self._readers))
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
        tasks = [asyncio.ensure_future(self._serve(reader)) for reader in self._readers]
        try:
            await asyncio.gather(*tasks)
        finally:
            tasks.extend(self._retries)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        for reader in self._readers:
            await reader.backend.close()

    async def _serve(self, reader: Reader) -> None:
        while True:
            tags, results = await reader.backend.completed()
            self.counters.wakes += 1
            finished = self._settle(reader, tags, results)
            self._fill(reader, reader.idle)
            for transfer in finished:
                transfer.when_done()

    def _fill(self, reader: Reader, limit: int) -> None:
        """Give a reader up to `limit` reads of the backlog, as far as it has room."""
        while reader.idle and limit > 0:
            backlog = self._backlogs[0] or self._backlogs[1]
            if not backlog:
                return
            serial = backlog[0]
            transfer = self._transfers[serial]
            count = min(len(transfer.requests) - transfer.next, reader.idle, limit)
            self.counters.entered(count)
            reader.take(serial, transfer, count)
            limit -= count
            if transfer.next == len(transfer.requests):
                backlog.popleft()

    def _settle(self, reader: Reader, tags: Tags, results: Results) -> Iterable[Transfer]:
        """Account for completed reads; returns the transfers that they finished."""
        good = results == reader.wanted[tags]
        if not good.all():
            for tag, result in zip(tags[~good].tolist(), results[~good].tolist(), strict=True):
                self._recover(reader, tag, result)
            tags = tags[good]
        if reader.patched:
            for tag in tags.tolist():
                reader.patched.pop(tag, None)
        reader.give_back(tags)
        self.counters.left(tags.size)
        return self._count_off(reader.serial[tags])

    def _count_off(self, serials: Tags) -> list[Transfer]:
        finished = []
        for serial, count in Counter(serials.tolist()).items():
            transfer = self._transfers[serial]
            transfer.open -= count
            if transfer.open == 0:
                del self._transfers[serial]
                finished.append(transfer)
        if not self._transfers:
            self._drained.set()
        return finished

    def _recover(self, reader: Reader, tag: int, result: int) -> None:
        """Read again what was refused or came short. Raises for what will not get better."""
        self.counters.retries += 1
        transfer = self._transfers[int(reader.serial[tag])]
        requests, row = transfer.requests, int(reader.index[tag])
        tries = 0
        if tag in reader.patched:
            (requests, tries), row = reader.patched[tag], 0
        offset = int(requests.offsets[row])
        if result < 0:
            if -result not in TRY_AGAIN or tries >= MAX_TRIES:
                raise StoreError(f"reading {self._describe(offset)} failed: {os.strerror(-result)}")
            rest, tries = requests.remainder(row, 0), tries + 1
        else:
            if result == 0 or offset + result >= self._size:
                raise StoreCorrupt(f"reading {self._describe(offset + result)} met an unexpected end of file")
            rest, tries = requests.remainder(row, result), 0
        reader.patched[tag] = (rest, tries)
        reader.wanted[tag] = rest.lengths[0]

        def again() -> None:
            reader.backend.submit(rest, 0, 1, np.array([tag], np.int64))

        if result < 0:
            self._later(again)
        else:
            again()

    def _later(self, again: Callable[[], None]) -> None:
        """Call after a pause, unless the pool has ended by then."""

        async def pause() -> None:
            await asyncio.sleep(RETRY_SECONDS)
            again()

        task = asyncio.ensure_future(pause())
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)
