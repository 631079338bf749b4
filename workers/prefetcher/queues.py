"""Which kind of queue reads: the best that this system has, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError
from workers.prefetcher import io_uring
from workers.prefetcher.backend import Backend, BackendUnavailable
from workers.prefetcher.bundle_file import BundleFile
from workers.prefetcher.io_uring import IoUring
from workers.prefetcher.threads import Threads


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
    if name == "threads":
        return [Threads(file, depth) for _ in range(count)], "reads by threads, as configured"
    if name == "aiofiles":
        from workers.prefetcher.aiofiles_backend import AioFiles

        return [AioFiles(file, depth) for _ in range(count)], "reads by aiofiles, as configured"
    assert name in ("auto", "io_uring"), f"no read backend {name}"
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
