"""A ring inside the caller's own program, with the interface of `client.Client`.

    from pipeline import Pipeline

    with Pipeline.open() as pipeline:
        for piece in pipeline.generate("Once upon a time", max_new_tokens=50):
            print(piece, end="", flush=True)

The workers are programs of their own, so no `__main__` guard is needed; they leave when this
process ends, however it ends.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Unpack

from pipeline.serving.answer import Answer, ChatMessage, RequestOptions, submission
from pipeline.serving.client_messages import Done, Health, Submit, Token
from pipeline.serving.opening import open_ring
from pipeline.serving.warm_ring import WarmRing, allowed_seconds, deadline_passed
from storage.errors import UsageError


class Pipeline:
    """A warm ring for one thread; it answers one request at a time."""

    def __init__(self, ring: WarmRing) -> None:
        self._ring = ring
        self._numbers = itertools.count(1)
        self._open: Generator[Token | Done, None, None] | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        model: str = "",
        *,
        memory: str = "",
        context: int = 0,
        config: Path | None = None,
        settings: Sequence[str] = (),
        chat_template: Path | None = None,
        reuse_prefix: bool = False,
        bits: int | None = None,
        quality: str = "",
    ) -> Pipeline:
        """Start a ring. The arguments are the command line's options; without `model`, the built-in one.

        Raises the FlashringError that the command line would show.
        """
        opened = open_ring(
            model,
            memory,
            context,
            config,
            settings,
            chat_template,
            reuse_prefix,
            bits=bits,
            quality=quality,
        )
        return cls(opened.ring)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Answer:
        """Continue a text (or token ids). Closes the answer before, if it is still open."""
        return self._submit(submission(next(self._numbers), prompt, (), options))

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[RequestOptions]) -> Answer:
        """Answer chat messages, through the model's own template."""
        return self._submit(submission(next(self._numbers), None, messages, options))

    def _submit(self, submit: Submit) -> Answer:
        if self._closed:
            raise UsageError("the pipeline is closed")
        seconds = allowed_seconds(submit)
        end = time.monotonic() + seconds
        if self._open is not None:
            self._open.close()
        self._open = self._events(submit, seconds, end)
        return Answer(self._open)

    def _events(self, submit: Submit, seconds: float, end: float) -> Generator[Token | Done, None, None]:
        """The ring's answer. Raises DeadlineExceeded once `end` has passed, as a server would."""

        def late() -> bool:
            return time.monotonic() >= end

        with closing(self._ring.answer(submit, late)) as events:
            for event in events:
                if late():
                    raise deadline_passed(seconds)
                yield event

    def stats(self) -> dict[str, float]:
        """The workers' counters as `WORKER.NAME`."""
        return {
            f"{worker}.{name}": value
            for worker, counters in self._ring.stats().items()
            for name, value in counters.items()
        }

    def health(self) -> Health:
        status = "damaged" if self._ring.damage else "ready" if self._ring.is_up else "restarting"
        return Health(0, status, 0)

    def close(self) -> None:
        """Cancel what runs and stop the ring."""
        self._closed = True
        self._ring.abandon()
        if self._open is not None:
            self._open.close()
        self._ring.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
