"""A queue of reads by aiofiles: the most portable, and the slowest.

aiofiles has positions, not positioned reads, so each read in flight has an open file of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

import aiofiles

from workers.prefetcher.backend import Completed
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.requests import Requests

MAX_FILES = 32  # asyncio's default pool has no more threads than that


class AioFiles:
    """See `Backend`."""

    def __init__(self, file: BundleFile, depth: int) -> None:
        self._file = file
        self._depth = min(depth, MAX_FILES)
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._opened: list[Any] = []
        self._reads: set[asyncio.Task[None]] = set()
        self._tell: Callable[[Completed], None] | None = None

    def on_completed(self, tell: Callable[[Completed], None]) -> None:
        self._tell = tell

    def prepare(self, requests: Requests, serial: int, row: int = 0) -> tuple[Requests, int, int]:
        return requests, serial, row

    def submit(self, prepared: tuple[Requests, int, int], start: int, stop: int) -> None:
        requests, serial, row = prepared
        for index in range(start, stop):
            read = asyncio.ensure_future(self._read(requests, index, serial, row + index))
            self._reads.add(read)
            read.add_done_callback(self._reads.discard)

    async def _read(self, requests: Requests, index: int, serial: int, row: int) -> None:
        try:
            result = await self._fill(int(requests.offsets[index]), requests.vector(index))
        except OSError as error:
            result = -(error.errno or errno.EIO)
        if self._tell is not None:
            self._tell([(row, serial, result)])

    async def _fill(self, offset: int, vector: list[tuple[int, int]]) -> int:
        """Bytes that arrived."""
        handle = await self._take()
        total = 0
        try:
            await handle.seek(offset)
            for address, length in vector:
                got = await handle.readinto((ctypes.c_char * length).from_address(address))
                total += got or 0
                if got != length:
                    break
        finally:
            self._idle.put_nowait(handle)
        return total

    async def _take(self) -> Any:
        if self._idle.empty() and len(self._opened) < self._depth:
            place = len(self._opened)
            self._opened.append(None)  # taken, before another read runs
            self._opened[place] = await aiofiles.open(
                self._file.path, "rb", buffering=0, opener=lambda path, _: os.open(path, self._file.flags)
            )
            return self._opened[place]
        return await self._idle.get()

    async def close(self) -> None:
        self._tell = None
        await asyncio.gather(*self._reads, return_exceptions=True)
        for handle in self._opened:
            if handle is not None:
                await handle.close()
