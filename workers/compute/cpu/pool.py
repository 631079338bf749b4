"""A pool of threads, each of which multiplies on itself alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from storage.codecs import F32


class Pool:
    """The process's products run on one thread each from the first pool on."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        threadpool_limits(1, "blas")  # for good: results must not change when another pool is closed
        self._pool = ThreadPoolExecutor(threads, "compute")
        self._own = threading.local()

    def run(self, task: Callable[..., None], *arguments: Iterable[Any]) -> None:
        """`task` for all arguments, at once."""
        for _ in self._pool.map(task, *arguments):
            pass

    def scratch(self, rows: int, width: int) -> F32:
        """[rows, width] of the calling thread's memory, which its next call gives away again."""
        memory: F32 | None = getattr(self._own, "memory", None)
        if memory is None or memory.size < rows * width:
            memory = self._own.memory = np.empty(rows * width, np.float32)
        return memory[: rows * width].reshape(rows, width)

    def close(self) -> None:
        self._pool.shutdown()
