"""A queue of reads by a pool of threads, each in one blocking `preadv`. Works everywhere."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from queue import SimpleQueue

import numpy as np

from workers.prefetcher.backend import Results, Tags
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.requests import Requests

MAX_THREADS = 64  # more only fight for the interpreter


class Threads:
    """See `Backend`."""

    def __init__(self, file: BundleFile, depth: int) -> None:
        self._descriptor = file.descriptor
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[int, int, int, int] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._done: list[tuple[int, int]] = []  # (tag, result), guarded by the lock
        self._arrived = asyncio.Event()
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

    def submit(self, requests: Requests, start: int, stop: int, tags: Tags) -> None:
        vectors = requests.iovecs.ctypes.data + requests.firsts[start:stop] * requests.iovecs.itemsize
        work = zip(
            tags.tolist(),
            requests.offsets[start:stop].tolist(),
            vectors.tolist(),
            requests.counts[start:stop].tolist(),
            strict=True,
        )
        for item in work:
            self._work.put(item)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            tag, offset, vector, count = item
            result = self._preadv(self._descriptor, vector, count, offset)  # without the interpreter's lock
            self._finish(tag, result if result >= 0 else -ctypes.get_errno())

    def _finish(self, tag: int, result: int) -> None:
        with self._lock:
            self._done.append((tag, result))
            first = len(self._done) == 1
        if first:  # the loop has been told of the others already
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def completed(self) -> tuple[Tags, Results]:
        await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            done, self._done = self._done, []
        table = np.array(done, np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    async def close(self) -> None:
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
