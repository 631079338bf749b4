"""A pool of threads, each of which multiplies on itself alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from storage.codecs import F32

T = TypeVar("T")
R = TypeVar("R")


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

    def in_order(
        self, task: Callable[[T], R], arguments: Sequence[T], weight: Callable[[T], int], most: int
    ) -> Iterator[R]:
        """Results in the arguments' order. Of those not taken yet, `most` a thread are begun, by `weight`."""
        waiting: deque[tuple[Future[R], int]] = deque()
        room = most * self.threads
        for argument in arguments:
            size = weight(argument)
            while waiting and size > room:
                future, freed = waiting.popleft()
                yield future.result()
                room += freed
            waiting.append((self._pool.submit(task, argument), size))
            room -= size
        for future, _ in waiting:
            yield future.result()

    def scratch(self, rows: int, width: int) -> F32:
        """[rows, width] of the calling thread's memory, which its next call gives away again."""
        memory: F32 | None = getattr(self._own, "memory", None)
        if memory is None or memory.size < rows * width:
            memory = self._own.memory = np.empty(rows * width, np.float32)
        return memory[: rows * width].reshape(rows, width)

    def close(self) -> None:
        self._pool.shutdown()
