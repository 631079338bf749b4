"""What a reader's queue must be able to do, and which implementation is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.requests import Requests

if TYPE_CHECKING:
    from workers.prefetcher.io_uring import IoUring

Completed = Iterable[tuple[int, int, int]]  # (row, serial, result) of each read


class Backend(Protocol):
    """One queue of reads from one file, driven by the event loop of the thread that made it.

    A read is named by a serial of the caller's, 0 .. 2^31 - 1, and a row; the caller never has more
    than `depth` in flight. A read's result is the number of bytes that arrived, or a negative errno:
    short reads and errors are the caller's to judge.
    """

    def on_completed(self, tell: Callable[[Completed], None]) -> None:
        """Call `tell` on the event loop with reads that are complete, at least one. Once, before any read."""

    def prepare(self, requests: Requests, serial: int, row: int = 0) -> Any:
        """The requests in the queue's own form, their rows counted from `row`, for every queue of its kind.

        Done once, because reads are submitted a few at a time.
        """

    def submit(self, prepared: Any, start: int, stop: int) -> None:
        """Begin reads start .. stop - 1. What was prepared must live until they are completed."""

    async def close(self) -> None:
        """Give everything back, and tell nothing more. Reads may still arrive in memory during this call."""


class BackendUnavailable(Exception):
    """This system does not have what a backend needs; the text says what."""


async def open_queues(
    name: str,
    file: BundleFile,
    depth: int,
    count: int,
    memory: npt.NDArray[np.uint8],
    best: Callable[[BundleFile, int], IoUring] | None = None,
) -> tuple[Sequence[Backend], str]:
    """`count` queues of `depth` by the backend called `name` or, for "auto", by the best there is.

    Reads of a single iovec fill `memory` and nothing else. All queues are of one kind, since they share
    what is prepared. Returns them with a sentence that says which one and why. Raises ConfigError when
    a backend that was asked for by name cannot be had. `best` stands in for io_uring.
    """
    from workers.prefetcher.threads import Threads

    if name == "threads":
        return [Threads(file, depth) for _ in range(count)], "reads by threads, as configured"
    if name == "aiofiles":
        from workers.prefetcher.aiofiles_backend import AioFiles

        return [AioFiles(file, depth) for _ in range(count)], "reads by aiofiles, as configured"
    assert name in ("auto", "io_uring"), f"no read backend {name}"
    from workers.prefetcher import io_uring

    queues: list[IoUring] = []
    try:
        for _ in range(count):
            queues.append((best or io_uring.IoUring)(file, depth))
    except BackendUnavailable as error:
        for queue in queues:
            await queue.close()
        if name != "auto":
            raise ConfigError(f"prefetcher.backend is io_uring, but {error}") from error
        return [Threads(file, depth) for _ in range(count)], f"reads by threads, because {error}"
    chosen = "as configured" if name == "io_uring" else "the kernel allows it"
    refusal = io_uring.register(queues, memory)
    buffers = f"buffers not registered ({refusal})" if refusal else "registered buffers"
    return queues, f"reads by io_uring, {chosen}, {buffers}"
