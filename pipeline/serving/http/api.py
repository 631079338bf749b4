"""The endpoints: OpenAI's, health, metrics, and the page that shows the ring at work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from importlib import resources
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pipeline.errors import STOPPING, USAGE, code_of
from pipeline.serving.calls import Tools
from pipeline.serving.client_messages import CANCELLED, Done, Error, Submit, Token
from pipeline.serving.http.refusal import Refusal
from pipeline.serving.openai_answers import Answers
from pipeline.serving.openai_api import ChatRequest, CompletionRequest, parse
from pipeline.serving.openai_tools import BadRequest, check_schemas
from pipeline.serving.prometheus import CONTENT_TYPE, PrometheusObserver
from pipeline.serving.scheduler import Event, Job, Scheduler
from storage.errors import FlashringError

MAX_BODY = 1 << 20  # bytes
KEEP_ALIVE = 15.0  # seconds without a token until a stream has a comment: proxies end what is silent for 60 s
COMMENT = ": the answer is on its way\n\n"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy collects the pieces
LIVE_SECONDS, WATCHED_SECONDS = 0.25, 3.0  # how often counters are renewed while somebody looks
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Api:
    """The endpoints of one scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        model: str,
        context: int,
        max_body: int = MAX_BODY,
        keep_alive: float = KEEP_ALIVE,
        disk_ceiling: float = 0.0,
    ) -> None:
        self._scheduler = scheduler
        self._keep_alive = keep_alive
        self._disk_ceiling = disk_ceiling
        self._model = model
        self._context = context
        self._max_body = max_body
        self._created = int(time.time())
        self._watched_until = 0.0
        self._page = resources.files("pipeline.serving").joinpath("page.html").read_text(encoding="utf-8")

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/ring", self.ring),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    # -- what the server is ----------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        status = self._scheduler.status
        body = {"status": status, "waiting": self._scheduler.waiting, "model": self._model}
        if status == "damaged":
            body["damage"] = self._scheduler.ring.damage
        return JSONResponse(body, 200 if status in ("ready", "busy") else 503)

    async def metrics(self, request: Request) -> Response:
        observer = self._scheduler.observer
        if not isinstance(observer, PrometheusObserver):
            return Refusal(404, "this server keeps no metrics").response()
        return Response(observer.page(), headers={"Content-Type": CONTENT_TYPE})

    async def ring(self, request: Request) -> Response:
        """The workers' counters, memory and disk, for the page; asking makes them fresh for a few seconds."""
        scheduler = self._scheduler
        self._watched_until = time.monotonic() + WATCHED_SECONDS
        scheduler.ring.live_seconds = LIVE_SECONDS
        asyncio.get_running_loop().call_later(WATCHED_SECONDS + 0.1, self._stop_watching)
        body = {
            "status": scheduler.status,
            "model": self._model,
            "context": self._context,
            "chat": scheduler.ring.template is not None,
            "waiting": scheduler.waiting,
            "time": time.monotonic(),
            "generated_tokens": scheduler.observer.generated_tokens,
            "disk_ceiling": self._disk_ceiling,
            **scheduler.ring.view(),
            "workers": scheduler.ring.stats(),
        }
        return JSONResponse(body)

    def _stop_watching(self) -> None:
        if time.monotonic() >= self._watched_until:
            self._scheduler.ring.live_seconds = 0.0

    def _describe_model(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "flashring"}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            return self._unknown_model(request.path_params["name"]).response()
        return JSONResponse(self._describe_model())

    def _unknown_model(self, name: str) -> Refusal:
        return Refusal(
            404,
            f"the model {name!r} does not exist: this server has the model {self._model!r}",
            "model_not_found",
            "model",
        )

    # -- completions -------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._respond(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        return await self._respond(request, ChatRequest)

    async def _respond(self, request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        try:
            wanted = parse(kind, await self._body(request))
            if wanted.model is not None and wanted.model != self._model:
                raise self._unknown_model(wanted.model)
            wanted.check()
            submits = wanted.submits()
            tools = wanted.callable_tools(self._scheduler.ring.template)
            await asyncio.to_thread(check_schemas, wanted.schema_of_answer, tools)
            answers = Answers(wanted, self._model, tools)
            if wanted.stream:
                return await self._stream(request, submits, answers, tools)
            choices = [await self._collect(request, submit, tools) for submit in submits]
            return JSONResponse(answers.whole(choices))
        except BadRequest as error:
            return Refusal(400, str(error), error.code or USAGE, error.param).response()
        except Refusal as refusal:
            return refusal.response()

    async def _body(self, request: Request) -> bytes:
        """Raises Refusal for another media type, and for a body over the limit or cut short."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            # Also what keeps other sites' pages in the user's browser from sending requests here.
            raise Refusal(415, "the body must be sent as Content-Type: application/json")
        body = b""
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > self._max_body:
                    raise Refusal(413, f"the body exceeds {self._max_body:,} bytes")
        except ClientDisconnect:
            raise Refusal(400, "the client left before its body had ended") from None
        return body

    async def _collect(
        self, request: Request, submit: Submit, tools: Tools | None
    ) -> tuple[list[Token], Done]:
        tokens: list[Token] = []
        async with contextlib.aclosing(self._events(request, submit, tools)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return tokens, event
                tokens.append(event)
        raise AssertionError("an answer without an end")

    async def _stream(
        self, request: Request, submits: list[Submit], answers: Answers, tools: Tools | None
    ) -> Response:
        """The headers wait a while for the first event, so that a refusal has its own status."""
        first = self._events(request, submits[0], tools)
        opening = _next(first)
        try:
            await asyncio.wait({opening}, timeout=self._keep_alive)
        except asyncio.CancelledError:
            opening.cancel()
            raise
        if opening.done() and opening.exception() is not None:
            opening.result()  # raises it
        parts = self._parts(request, submits, answers, first, opening)
        return StreamingResponse(parts, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _parts(
        self,
        request: Request,
        submits: list[Submit],
        answers: Answers,
        first: AsyncGenerator[Token | Done, None],
        opening: asyncio.Future[Token | Done],
    ) -> AsyncIterator[str]:
        dones: list[Done] = []
        coming = opening
        try:
            for index, submit in enumerate(submits):
                events = first if index == 0 else self._events(request, submit)
                async with contextlib.aclosing(events):
                    begin = answers.first(index)
                    if begin is not None:
                        yield _line(begin)
                    if index > 0:
                        coming = _next(events)
                    try:
                        while True:
                            while not (await asyncio.wait({coming}, timeout=self._keep_alive))[0]:
                                yield COMMENT
                            event = coming.result()
                            if isinstance(event, Done):
                                break
                            coming = _next(events)
                            for piece in answers.pieces(index, event):
                                yield _line(piece)
                    finally:
                        await _ended(coming)
                    dones.append(event)
                    for piece in answers.last(index, event):
                        yield _line(piece)
            usage = answers.usage(dones)
            if usage is not None:
                yield _line(usage)
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            yield _line(refusal.body())

    async def _events(
        self, request: Request, submit: Submit, tools: Tools | None = None
    ) -> AsyncGenerator[Token | Done, None]:
        """Run one request; a client that leaves cancels it. Raises Refusal."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(request.client, submit, queue.put_nowait, tools)
        try:
            self._scheduler.submit(job)
        except FlashringError as error:
            raise Refusal.of(code_of(error), str(error), submit) from error
        watcher = asyncio.create_task(self._watch(request, job))
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Error):
                    raise Refusal.of(event.code, event.message, submit)
                if isinstance(event, Done) and event.reason == CANCELLED:  # the client has left
                    raise Refusal.of(STOPPING, "the answer was cut")
                yield event
                if isinstance(event, Done):
                    return
        finally:
            watcher.cancel()
            if not job.ended:
                self._scheduler.abandon(job)

    async def _watch(self, request: Request, job: Job) -> None:
        """Cancel the job when its client has closed the connection."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._scheduler.cancel(job)


def _next(events: AsyncGenerator[Token | Done, None]) -> asyncio.Future[Token | Done]:
    """The next event, to be waited for in parts. Its failure needs no listener."""
    coming = asyncio.ensure_future(anext(events))
    coming.add_done_callback(lambda done: done.cancelled() or done.exception())
    return coming


async def _ended(coming: asyncio.Future[Any]) -> None:
    """Nobody waits for the next event any more: its generator is free to be closed."""
    coming.cancel()
    await asyncio.wait({coming})


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
