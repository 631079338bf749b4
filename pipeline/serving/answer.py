"""What a caller holds while its request is answered: an iterator over pieces of text."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

from pipeline.errors import AnswerCut
from pipeline.serving.client_messages import Done, Submit, SubmitStructured, Token

ChatMessage = Mapping[str, Any]  # {"role": "user", "content": "…"}


class RequestOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `chat`.

    Where one of the first four is left out or None, the configuration of the model decides, as in
    `run.py`.
    """

    max_new_tokens: int | None
    temperature: float | None  # 0: always the likeliest token
    top_k: int | None  # 0: no limit
    top_p: float | None  # 1: no limit
    seed: int  # default 0
    stop: str | Sequence[str]  # the answer ends before the first of these
    ignore_eos: bool  # go on after an end-of-text token
    deadline: float  # seconds, waiting included; default 0: the server's limit, in a Pipeline none
    json_schema: str | Mapping[str, Any] | None  # the answer is JSON of this schema


def submission(
    request: int,
    prompt: str | Sequence[int] | None,
    messages: Sequence[ChatMessage],
    options: RequestOptions,
) -> Submit:
    """The message for a request; a prompt is a text or token ids."""
    stop, schema = options.get("stop", ()), options.get("json_schema")
    submit = Submit(
        request=request,
        prompt=prompt if isinstance(prompt, str) else None,
        tokens=() if prompt is None or isinstance(prompt, str) else tuple(prompt),
        messages=tuple(dict(message) for message in messages),
        max_new_tokens=options.get("max_new_tokens"),
        temperature=_real(options.get("temperature")),
        top_k=options.get("top_k"),
        top_p=_real(options.get("top_p")),
        seed=options.get("seed", 0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=options.get("ignore_eos", False),
        deadline=float(options.get("deadline", 0.0)),
    )
    if schema is None:
        return submit
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return SubmitStructured(
        **{one.name: getattr(submit, one.name) for one in fields(submit)}, json_schema=text
    )


def _real(value: float | None) -> float | None:
    return None if value is None else float(value)


class _Collected:
    """What has come so far."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.moments: list[float] = []  # arrival of each token, time.monotonic seconds
        self.done: Done | None = None  # how it ended, and what it cost
        self._given_up = False  # by its reader

    def _check_end(self) -> None:
        """Raises AnswerCut where pieces have run out and neither side had ended the answer."""
        if self.done is None and not self._given_up:
            raise AnswerCut(
                "the answer was cut before its end: whoever wrote it was closed, or began another"
            )

    def _take(self, event: Token | Done) -> str:
        """Note an event; the text that it brought."""
        if isinstance(event, Done):
            self.done = event
            return ""
        if event.token is not None:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
            self.moments.append(time.monotonic())
        self.text += event.text
        return event.text


class Answer(_Collected, Iterator[str]):
    """Pieces of text as they arrive. Closing it, or leaving its `with`, cancels the request."""

    def __init__(
        self, events: Generator[Token | Done, None, None], abandon: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._events = events
        self._abandon = abandon  # an iterator that never began cannot clean up by itself

    def __next__(self) -> str:
        while True:
            try:
                event = next(self._events)
            except StopIteration:
                self._check_end()
                raise
            if text := self._take(event):
                return text

    def read(self) -> str:
        """Wait for the end; the whole text."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        self._given_up = True
        self._events.close()
        self._abandon()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncAnswer(_Collected, AsyncIterator[str]):
    """`Answer` for `async for`."""

    def __init__(self, events: AsyncGenerator[Token | Done, None]) -> None:
        super().__init__()
        self._events = events

    async def __anext__(self) -> str:
        while True:
            try:
                event = await anext(self._events)
            except StopAsyncIteration:
                self._check_end()
                raise
            if text := self._take(event):
                return text

    async def read(self) -> str:
        """Wait for the end; the whole text."""
        async for _ in self:
            pass
        return self.text

    async def aclose(self) -> None:
        self._given_up = True
        await self._events.aclose()

    async def __aenter__(self) -> AsyncAnswer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
