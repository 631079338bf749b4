"""What a reader's queue must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from workers.prefetcher.requests import Requests

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
