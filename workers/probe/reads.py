"""The prefetcher alone: random reads of one size from one file, by the code that the ring uses.

The file should be larger than a disk's cache; nothing is written.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from pathlib import Path

import numpy as np

from pipeline.planner.machine import available_bytes
from storage.errors import UsageError
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.pool import ReaderPool
from workers.prefetcher.queues import open_queues
from workers.prefetcher.requests import Requests

BUFFER_BYTES = 64 << 20  # of destinations, used in turn
PAGE = 4096
SCRAPS, SHARE = 2 << 30, 1 / 8  # bytes of pages that were used before, and most of what is available

Memory = np.ndarray[tuple[int], np.dtype[np.uint8]]


def new_pages(size: int) -> Memory:
    """Memory as a ring's slots are: shared, and of pages that nobody has used since they lay in large blocks.

    A virtual disk fills pages that are neighbours in the machine's memory, and ascend, up to twice as fast as
    single ones. A ring takes gigabytes, and most of them are such. A few megabytes are of the scraps that
    others gave back just now, in any order: the same reads got 2.6 GB/s, or 1.3 after a ring had ended. So
    scraps are taken first, and held until this has its own.
    """
    with mmap.mmap(-1, max(PAGE, min(SCRAPS, int(SHARE * available_bytes())))) as scraps:
        held = np.frombuffer(scraps, np.uint8)
        held[::PAGE] = 1
        memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        memory[::PAGE] = 1  # the kernel must not have to find pages while it is measured
        del held
    return memory


async def measure(
    path: Path,
    request_bytes: int,
    readers: int,
    depth: int,
    count: int,
    backend: str = "auto",
    seed: int = 0,
    part: int = 0,
    ahead: int = 2,
    sequential: bool = False,
    direct: bool = True,
    buffers: int = 0,
    memory: Memory | None = None,
) -> dict[str, float | str]:
    """Read `count` blocks of `path` at random places (or one after another) and say how it went.

    `depth` is each reader's. Reads fill `buffers` of `memory` in turn, by default BUFFER_BYTES of new pages:
    more than a processor's cache keeps, as a ring's slots are. With `part`, reads are asked for in parts of
    that many, `ahead` parts at a time, as the ring does; otherwise all at once. CPU time is this process's,
    user and system. Raises StoreError when the file cannot be read, UsageError when it is smaller than
    one read, and ConfigError for a backend that is not there.
    """
    slots = buffers or max(BUFFER_BYTES // request_bytes, 1)
    with BundleFile.open(path, request_bytes, direct) as file:
        blocks = file.size // request_bytes
        if blocks == 0:
            raise UsageError(f"{path} is smaller than one read of {request_bytes:,} bytes")
        view = new_pages(slots * request_bytes) if memory is None else memory
        assert view.nbytes >= slots * request_bytes, "fewer bytes than destinations"
        chosen = np.arange(count) % blocks
        if not sequential:
            chosen = np.random.default_rng(seed).integers(0, blocks, count)
        parts = [
            _requests(chosen[at : at + (part or count)], at, view.ctypes.data, slots, request_bytes)
            for at in range(0, count, part or count)
        ]
        queues, chosen_backend = await open_queues(backend, file, depth, readers, view)
        pool = ReaderPool(queues, depth, file.size, lambda at: f"{path} at {at}")
        serving = asyncio.ensure_future(pool.run())
        try:
            started, spent = time.perf_counter(), time.process_time()
            await _read_all(pool, parts, ahead, serving)
            seconds, spent = time.perf_counter() - started, time.process_time() - spent
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await pool.close()
    return {
        "bytes_per_second": count * request_bytes / seconds,
        "reads_per_second": count / seconds,
        "cpu_us_per_read": 1e6 * spent / count,
        "seconds": seconds,
        "reads_per_wake": count / max(pool.counters.wakes, 1),
        "peak_in_flight": float(pool.counters.peak_in_flight),
        "retries": float(pool.counters.retries),
        "note": f"{chosen_backend}, {file.note}",
    }


def _requests(
    blocks: np.ndarray[tuple[int], np.dtype[np.int64]], at: int, base: int, slots: int, size: int
) -> Requests:
    iovecs = np.empty((blocks.size, 2), np.int64)
    iovecs[:, 0] = base + (np.arange(at, at + blocks.size) % slots) * size
    iovecs[:, 1] = size
    return Requests.scatter(blocks * size, np.arange(blocks.size + 1), iovecs, bundles=blocks.size)


async def _read_all(
    pool: ReaderPool, parts: list[Requests], ahead: int, serving: asyncio.Future[None]
) -> None:
    """Keep `ahead` parts under way. Raises what the pool raises."""
    waiting = iter(parts)
    left = len(parts)
    ended = asyncio.get_running_loop().create_future()

    def advance() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            ended.set_result(None)
        following = next(waiting, None)
        if following is not None:
            pool.submit(following, advance)

    for _ in range(min(ahead, len(parts))):
        pool.submit(next(waiting), advance)
    await asyncio.wait({ended, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
