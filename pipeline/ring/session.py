"""A session: one warm ring, one generation at a time.

`Session.generate` yields text as tokens arrive; `Session.summary` tells afterwards what it cost.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from pipeline import dials, quality
from pipeline.config import Config
from pipeline.console import say
from pipeline.ring.counters import PROMPT_LAYERS
from pipeline.ring.generation import Generation, GenerationParams, Piece
from pipeline.ring.messages import Cancel, Finished, Generate, Message, Stats, TokenReady
from pipeline.ring.plan import Plan
from pipeline.ring.request import Request
from pipeline.ring.summary import MemoryUse, Summary
from pipeline.ring.supervisor import Supervisor
from pipeline.ring.text import AddedToken, Detokenizer, added_tokens
from pipeline.ring.watchdog import Watchdog
from storage.errors import RingError, UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer

CANCEL_SECONDS = 0.1  # how often a silent ring's `cancelled` is asked
ASK_SECONDS = 1.0  # of silence, after which who looks gets fresh counters this often
TOKEN_SECONDS = 600.0  # the longest silence before a token, after which the ring counts as hung
# More of it for each token of a prompt, since compute says nothing before the answer's first one: a 40B
# model's 80 GFLOP at the 20 GFLOP/s of a slow machine.
PROMPT_TOKEN_SECONDS = 4.0


class Session:
    """A ring and its tokenizer. Use as a context manager."""

    def __init__(
        self,
        store: Store,
        config: Config,
        plan: Plan,
        routes: Mapping[str, str] | None = None,
        budget: int | None = None,
        programs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Starts the ring; raises RingError if it does not come up.

        `budget`: the bytes that the plan divides, for the summary; None where there was no budget.
        `programs`: see `Supervisor`.
        """
        started = time.monotonic()
        self.store = store
        self.config = config
        self.plan = plan
        self.budget = budget
        self.tokenizer = load_tokenizer(store)
        self.last: Generation | None = None
        self.token_seconds = TOKEN_SECONDS
        self.abandoned = False  # set, from any thread, by who will close the session next: nothing is drained
        self.live: dict[str, dict[str, float]] = {}  # every worker's latest counters
        self.live_seconds = 0.0  # renew `live` this often in mid-generation; 0: only at its end
        self._live_due = 0.0
        self.look: Callable[[], None] | None = None  # called about ten times a second in mid-generation
        self._since = 0.0  # when the ring gave its last sign of life: time.monotonic seconds
        self.reuse_prefix = False  # see PROTOCOL.md, "Reuse of a prompt's beginning", for its price
        self._run = 0
        self.ring = Supervisor(store, config, plan, routes, programs)
        self.watchdog = Watchdog(self.ring.pids, self.ring.ask_stats, say)
        self.load_seconds = time.monotonic() - started

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of `prompt`, by default with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(prompt, add_special_tokens=special).ids)

    @property
    def added_tokens(self) -> dict[str, AddedToken]:
        return added_tokens(self.tokenizer)

    def generate(self, prompt: str | Sequence[int], params: GenerationParams) -> Iterator[str]:
        """Yield pieces of text, never splitting a character.

        Leaving the iterator early cancels the generation and drains the ring. Raises UsageError for
        a prompt that is empty or does not fit the context.
        """
        return self.texts(Request.of(prompt, params, self.tokenizer, self.store, self.plan))

    def texts(self, request: Request) -> Iterator[str]:
        """`generate` for a request that has been checked."""
        with contextlib.closing(self.stream(request)) as pieces:
            for piece in pieces:
                if piece.text:
                    yield piece.text

    def pieces(
        self,
        prompt: str | Sequence[int],
        params: GenerationParams,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[Piece, None, None]:
        """Yield every token as it arrives; `generate` is its text.

        `cancelled` is asked at every token, and a few times a second in between: once it is true the
        ring ends the run at its next token, or between layers of its prefill, and the iteration ends.
        """
        return self.stream(Request.of(prompt, params, self.tokenizer, self.store, self.plan), cancelled)

    def stream(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Piece, None, None]:
        """`pieces` of a request that has been checked."""
        ids, params = request.ids, request.params
        if params.grammar is not None and not self.config.compute.structured:
            raise UsageError("answers of a given form are switched off here: compute.structured is false")
        self._run += 1
        run = self._run
        self.watchdog.heard()
        cached = self._cached(ids)
        generation = Generation(prompt=ids, cached=cached, before=self.ring.stats())
        self.live, self._since = dict(generation.before), time.monotonic()
        self.last = generation
        room = self.plan.context - len(ids)
        self.ring.send(
            "compute",
            Generate(
                run=run,
                prompt=ids,
                max_new_tokens=min(params.max_new_tokens, room),
                temperature=params.sampling.temperature,
                top_k=params.sampling.top_k,
                top_p=params.sampling.top_p,
                seed=params.sampling.seed,
                stop_tokens=() if params.ignore_eos else self.store.architecture.eos_tokens,
                forced=params.forced,
                cached=cached,
                grammar=params.grammar.text if params.grammar is not None else "",
            ),
        )
        marks = () if params.grammar is None else params.grammar.marks
        text = Detokenizer(self.tokenizer, {self.added_tokens[mark].number: mark for mark in marks})
        try:
            while generation.finished is None:
                message = self._next(self._patience(generation), cancelled)
                if message is None:
                    self._cancel(generation, run)
                    return
                if isinstance(message, TokenReady) and message.run == run:
                    generation.tokens.append(message.token)
                    generation.logprobs.append(message.logprob)
                    generation.moments.append(time.monotonic())
                    self._since = generation.moments[-1]
                    completed = text.push(message.token)
                    generation.text += completed
                    yield Piece(message.token, completed, message.logprob)
                elif isinstance(message, Finished) and message.run == run:
                    generation.finished = message
                elif isinstance(message, Stats):
                    self.live[message.name] = message.values
        except RingError:  # nothing is left to be cancelled
            raise
        except BaseException as error:  # its reader has left; after an interrupt nothing is waited for
            self._cancel(generation, run, drain=isinstance(error, GeneratorExit))
            raise
        if generation.finished.error:
            raise UsageError(generation.finished.error)
        rest = text.finish()
        generation.text += rest
        generation.after = self.live = self.ring.stats()
        self.ring.memory.sample(now=True)
        if rest:
            yield Piece(None, rest, 0.0)

    def _cached(self, ids: tuple[int, ...]) -> int:
        """How many tokens of a prompt have their keys and values in the cache; the last one never counts.

        The last token of a run was sampled but never went through the model. A run without any may
        have ended in mid-prefill, which leaves some layers behind others.
        """
        last = self.last
        if not self.reuse_prefix or last is None or not last.tokens:
            return 0
        held = (*last.prompt, *last.tokens[:-1])
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(held, ids[:-1], strict=False))
        return sum(1 for _ in same)

    def _patience(self, generation: Generation) -> float:
        """The longest silence, in seconds, that may come before the next token."""
        awaited = 0 if generation.tokens else len(generation.prompt) - generation.cached
        return self.token_seconds + PROMPT_TOKEN_SECONDS * awaited

    def _next(self, patience: float, cancelled: Callable[[], bool]) -> Message | None:
        """The ring's next message, or None once `cancelled`.

        Raises RingError for a worker that hangs, and after `patience` seconds without any.
        """
        deadline = time.monotonic() + patience
        while not cancelled():
            message = self.ring.receive(CANCEL_SECONDS)
            self._ask_for_live_stats()
            if self.look is not None:
                self.look()
            if isinstance(message, Stats):
                self.watchdog.counted(message)
                return message
            if message is not None:
                self.watchdog.heard()
                return message
            self.watchdog.quiet(CANCEL_SECONDS)
            if time.monotonic() >= deadline:
                raise RingError(f"the ring was silent for {patience:.0f} s")
        return None

    def _ask_for_live_stats(self) -> None:
        now = time.monotonic()
        curious = self.look is not None and now - self._since >= ASK_SECONDS
        every = self.live_seconds or (ASK_SECONDS if curious else 0.0)
        if every and now >= self._live_due:
            self._live_due = now + every
            self.ring.ask_stats()

    def view(self) -> dict[str, float | None]:
        """For people: the most memory so far, its budget, and how much of a running prompt is done.

        `prompt` is a share, or None where no prompt is being read. May be called from any thread.
        """
        last = self.last
        reading = last is not None and not last.tokens and last.finished is None
        return {
            "memory_bytes": self.ring.memory.bytes,
            "budget_bytes": self.budget,
            "prompt": self.prompt_done if reading else None,
        }

    @property
    def prompt_done(self) -> float:
        """How much of the last prompt is done, as a share of the layers, by the latest counters."""
        assert self.last is not None
        before = self.last.before.get("compute", {}).get(PROMPT_LAYERS, 0.0)
        done = self.live.get("compute", {}).get(PROMPT_LAYERS, 0.0) - before
        return min(1.0, max(0.0, done / self.plan.layers))

    @property
    def silent_seconds(self) -> float:
        """Since the running generation began, or since its last token."""
        return time.monotonic() - self._since

    def check(self) -> None:
        """Raises RingError if a worker has died. Only between generations."""
        self.ring.check()

    def _cancel(self, generation: Generation, run: int, *, drain: bool = True) -> None:
        """End the run early; once drained, the ring can begin another at once.

        Without that the next run waits for this one, and skips what it still says.
        """
        if self.abandoned:
            return
        with contextlib.suppress(RingError):  # the ring itself is gone, and the caller already has the reason
            self.ring.send("compute", Cancel(run))
            if drain:
                self._drain(generation, run)

    def _drain(self, generation: Generation, run: int) -> None:
        """Wait for a cancelled run's end, unless the session is abandoned meanwhile. Raises RingError."""
        while generation.finished is None:
            message = self._next(self._patience(generation), lambda: self.abandoned)
            if message is None:
                return
            if isinstance(message, Finished) and message.run == run:
                generation.finished = message
        generation.after = self.live = self.ring.stats()
        self.ring.memory.sample(now=True)

    def summary(self) -> Summary:
        """The cost of the last generation, which has ended: completed, or cancelled and drained."""
        assert self.last is not None
        return Summary.of(
            self.last,
            self.plan,
            self.config,
            load_seconds=self.load_seconds,
            memory=MemoryUse(self.budget, self.ring.memory.bytes),
            pids=self.ring.pids,
            notes=self.ring.notes,
            lossy=(*dials.in_words(self.store, self.config), *quality.in_words(self.store, self.config)),
        )

    def close(self) -> None:
        self.ring.stop()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
