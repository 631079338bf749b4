"""A queue of reads by a pool of threads, each in one blocking `preadv`. Works everywhere."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue

from workers.prefetcher.backend import Completed
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.requests import IOVEC_BYTES, Requests, address

MAX_THREADS = 128  # as many as the defaults have reads in flight; more only fight for the interpreter

Work = tuple[int, int, int, int, int]  # serial, row, offset, iovecs' address, iovecs


class Threads:
    """See `Backend`."""

    def __init__(self, file: BundleFile, depth: int) -> None:
        self._descriptor = file.descriptor
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._done: list[tuple[int, int, int]] = []  # (row, serial, result), guarded by the lock
        self._tell: Callable[[Completed], None] | None = None
        libc = ctypes.CDLL(None, use_errno=True)
        self._preadv = libc.preadv
        self._preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
        self._preadv.restype = ctypes.c_ssize_t
        self._threads = [
            threading.Thread(target=self._serve, name=f"read-{i}", daemon=True)
            for i in range(min(depth, MAX_THREADS))
        ]
        for thread in self._threads:
            thread.start()

    def on_completed(self, tell: Callable[[Completed], None]) -> None:
        self._tell = tell

    def prepare(self, requests: Requests, serial: int, row: int = 0) -> list[Work]:
        vectors = requests.firsts * IOVEC_BYTES + address(requests.iovecs)
        reads = zip(requests.offsets.tolist(), vectors.tolist(), requests.counts.tolist(), strict=True)
        return [(serial, row + index, *read) for index, read in enumerate(reads)]

    def submit(self, prepared: list[Work], start: int, stop: int) -> None:
        for item in prepared[start:stop]:
            self._work.put(item)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            serial, row, offset, vector, count = item
            result = self._preadv(self._descriptor, vector, count, offset)  # without the interpreter's lock
            self._finish(serial, row, result if result >= 0 else -ctypes.get_errno())

    def _finish(self, serial: int, row: int, result: int) -> None:
        with self._lock:
            self._done.append((row, serial, result))
            first = len(self._done) == 1
        if first:  # the loop has been told of the others already
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        if self._tell is not None:
            self._tell(done)

    async def close(self) -> None:
        self._tell = None
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
