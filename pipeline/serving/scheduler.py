"""Who is served when: a bounded, fair queue in front of one ring.

The ring answers one request at a time, in a thread of its own; everything else happens on the
event loop, to which that thread hands each token. The fronts (`server.py` for ZeroMQ, `http/`)
submit a `Job` and get its messages through `deliver`, on the event loop, in order.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from contextlib import closing

from pipeline.errors import (
    DAMAGED,
    DEADLINE,
    INTERNAL,
    RING,
    STOPPING,
    QueueFull,
    RingGaveUp,
    ServerUnavailable,
    code_of,
)
from pipeline.serving.calls import Tools
from pipeline.serving.client_messages import CANCELLED, Done, Error, Submit, Token
from pipeline.serving.fair_queue import FairQueue
from pipeline.serving.observer import Observer
from pipeline.serving.warm_ring import WarmRing, allowed_seconds, deadline_passed
from storage.errors import DamagedStore, FlashringError, RingError

IDLE_SECONDS = 0.5  # how often an idle ring is looked at
Event = Token | Done | Error


class Job:
    """One request on its way: waiting, running or over."""

    def __init__(
        self,
        client: Hashable,
        submit: Submit,
        deliver: Callable[[Event], None],
        tools: Tools | None = None,
    ) -> None:
        """`tools`: those that the answer may call."""
        self.client = client
        self.submit = submit
        self.tools = tools
        self.deliver = deliver
        self.submitted = time.monotonic()
        self.started = 0.0
        self.last_token = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.ended = False  # nothing is delivered any more; only touched on the event loop
        self.cancelled = False  # read by the ring's thread


class Scheduler:
    """Queue, ring thread and deadlines. All methods belong to the event loop."""

    def __init__(
        self,
        ring: WarmRing,
        *,
        queue_limit: int = 64,
        longest: float = 3600.0,
        observer: Observer | None = None,
    ) -> None:
        """`queue_limit` requests may wait; none takes more than `longest` seconds altogether."""
        self.ring = ring
        self.longest = longest
        self.observer = observer or Observer()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.running: Job | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: FairQueue[Job] = FairQueue(queue_limit)
        self._changed = threading.Condition()  # guards the queue and `_stopping`
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="ring", daemon=True)
        self._thread.start()

    # -- for the fronts ------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests in the queue, without the one that runs."""
        return len(self._queue)

    @property
    def status(self) -> str:
        if self._stopping or self.failed.done():
            return "stopping"
        if self.ring.damage:
            return "damaged"
        if not self.ring.is_up:
            return "restarting"
        return "busy" if self.running is not None else "ready"

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises QueueFull, ServerUnavailable, or UsageError for its deadline."""
        if self._stopping or self.failed.done():
            raise ServerUnavailable("the server is stopping")
        seconds = allowed_seconds(job.submit, self.longest)
        with self._changed:
            try:
                self._queue.push(job.client, job)
            except QueueFull:
                self.observer.refused()
                raise
            self._changed.notify()
        job.timer = self._loop.call_later(seconds, self._expire, job, seconds)

    def cancel(self, job: Job) -> None:
        """End a job at its next token; a waiting one is answered at once."""
        job.cancelled = True
        if self._take_out(job):
            self._hand_over(job, _never_started(job))

    def abandon(self, job: Job) -> None:
        """Cancel a job that nobody listens to any more."""
        self.cancel(job)
        if not job.ended:
            self._end(job, "gone")

    def positions(self) -> list[tuple[Job, int]]:
        """Every live job with the number of jobs before it; the running one has 0."""
        with self._changed:
            waiting = self._queue.order()
        running = [(self.running, 0)] if self.running is not None else []
        return running + [(job, place + 1) for place, job in enumerate(waiting)]

    async def stop(self) -> None:
        """Refuse what waits, end what runs, and close the ring."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.ring.abandon()
        self._refuse_all(STOPPING, "the server is stopping")
        await asyncio.to_thread(self._thread.join)

    # -- on the event loop ---------------------------------------------------------------------

    def _take_out(self, job: Job) -> bool:
        with self._changed:
            return self._queue.remove(job.client, job)

    def _expire(self, job: Job, seconds: float) -> None:
        if job.ended:
            return
        job.cancelled = True
        self._take_out(job)
        self._hand_over(job, Error(job.submit.request, DEADLINE, str(deadline_passed(seconds))))

    def _refuse_all(self, code: str, message: str) -> None:
        while True:
            with self._changed:
                job = self._queue.pop()
            if job is None:
                return
            self._hand_over(job, Error(job.submit.request, code, message))

    def _hand_over(self, job: Job, event: Event) -> None:
        """Deliver one event of a job, and see to its end."""
        if job.ended:
            return
        if isinstance(event, Done) and event.reason == CANCELLED and not job.cancelled:
            event = Error(event.request, STOPPING, "the server is stopping, and the answer was cut")
        if isinstance(event, Token):
            self._observe_token(job, event)
        else:
            self._end(job, event.code if isinstance(event, Error) else event.reason)
            if isinstance(event, Done):
                self.observer.answered(event, time.monotonic() - job.submitted)
        job.deliver(event)

    def _observe_token(self, job: Job, event: Token) -> None:
        if event.token is None:
            return
        now = time.monotonic()
        since = job.last_token or job.submitted
        self.observer.token(now - since, first=not job.last_token)
        job.last_token = now

    def _end(self, job: Job, outcome: str) -> None:
        job.ended = True
        if job.timer is not None:
            job.timer.cancel()
        self.observer.ended(outcome)

    def _started(self, job: Job | None) -> None:
        self.running = job

    def _fail(self, error: BaseException) -> None:
        """The ring is down for good: nothing can be served any more."""
        self._refuse_all(RING, str(error))
        if not self.failed.done():
            self.failed.set_exception(error)

    # -- in the ring's thread ------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                self._answer(job)
                self._call(self._started, None)
        except Exception as error:
            self._call(self._fail, error)
        finally:
            self.ring.close()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # the loop is closed: nobody is left to be told

    def _next_job(self) -> Job | None:
        """Wait for the next job, keeping the ring alive meanwhile; None at the end."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                job = self._queue.pop()
                if job is None:
                    self._changed.wait(IDLE_SECONDS)
                    job = None if self._stopping else self._queue.pop()
            if job is not None:
                self._call(self._started, job)
                return job
            if not self._stopping:
                self._keep_warm()

    def _keep_warm(self) -> None:
        """Look at the ring, and start it again if it has died. Raises RingGaveUp.

        Of a damaged store only requests hear.
        """
        try:
            self.ring.check()
        except DamagedStore:
            return
        except RingGaveUp:
            raise
        except RingError as error:
            self._call(self.observer.ring_died, str(error))
        while not self._stopping:
            try:
                self.ring.revive()
                return
            except DamagedStore:
                return
            except RingGaveUp:
                raise
            except RingError as error:
                self._call(self.observer.ring_died, str(error))

    def _answer(self, job: Job) -> None:
        """Run one job to its end. Raises RingGaveUp, after telling the job's client."""
        job.started = time.monotonic()
        request = job.submit.request

        def cancelled() -> bool:
            # When it stops, the event loop may not know yet that this job runs.
            return job.cancelled or self._stopping

        try:
            self._keep_warm()
            queued = job.started - job.submitted
            with closing(self.ring.answer(job.submit, cancelled, queued, job.tools)) as events:
                for event in events:
                    self._call(self._hand_over, job, event)
        except DamagedStore as error:
            self._call(self._hand_over, job, Error(request, DAMAGED, str(error)))
        except RingError as error:
            self._call(self._hand_over, job, Error(request, RING, str(error)))
            self._call(self.observer.ring_died, str(error))
            if isinstance(error, RingGaveUp):
                raise
        except FlashringError as error:
            self._call(self._hand_over, job, Error(request, code_of(error), str(error)))
        except Exception as error:  # a bug: this request fails, the server goes on with a new ring
            traceback.print_exc()  # for whoever looks after the server; the client gets one sentence
            self.ring.close()
            self._call(self._hand_over, job, Error(request, INTERNAL, f"internal error: {error!r}"))


def _never_started(job: Job) -> Done:
    waited = time.monotonic() - job.submitted
    return Done(job.submit.request, CANCELLED, 0, 0, 0, waited, 0.0, 0.0)
