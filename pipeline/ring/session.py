"""A session: one warm ring, one generation at a time.

`Session.generate` yields text as tokens arrive; `Session.summary` tells afterwards what it cost.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pipeline.config import Config
from pipeline.ring import audit
from pipeline.ring.messages import Cancel, Finished, Generate, Message, Stats, TokenReady
from pipeline.ring.plan import Plan
from pipeline.ring.supervisor import Supervisor
from pipeline.ring.text import Detokenizer
from storage.errors import RingError, UsageError
from storage.store import Store
from storage.tokenizer import load_tokenizer

CANCEL_SECONDS = 0.1  # how often a silent ring's `cancelled` is asked
TOKEN_SECONDS = 600.0  # the longest silence before a token, after which the ring counts as hung
# More of it for each token of a prompt, since compute says nothing before the answer's first one: a 40B
# model's 80 GFLOP at the 20 GFLOP/s of a slow machine.
PROMPT_TOKEN_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How to decode."""

    max_new_tokens: int = 200
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # 1: no limit
    seed: int = 0
    ignore_eos: bool = False
    forced: tuple[int, ...] = ()  # these tokens instead of sampled ones, for measurements

    def check(self) -> None:
        """Raises UsageError naming the first value out of range."""
        rules = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (0.0 <= self.temperature < float("inf"), "temperature must be zero or a positive number"),
            (0 <= self.top_k < 2**31, "top_k must be between 0 and 2**31 - 1"),
            (0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1"),
            (0 <= self.seed < 2**63, "seed must be between 0 and 2**63 - 1"),
        )
        for holds, sentence in rules:
            if not holds:
                raise UsageError(sentence)


@dataclass(frozen=True, slots=True)
class Piece:
    """One more token, and the text that it completes."""

    token: int | None  # None: the end of the text, which was held back until no token follows
    text: str  # empty while a character is incomplete
    logprob: float


@dataclass(slots=True)
class Generation:
    """What is known of the running, or of the last, generation."""

    prompt: tuple[int, ...]
    cached: int = 0  # tokens of the prompt whose keys and values were reused
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)  # arrival of each token, time.monotonic seconds
    text: str = ""
    finished: Finished | None = None
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)

    def delta(self, worker: str, name: str) -> float:
        """A counter's growth over this generation."""
        return self.after[worker].get(name, 0.0) - self.before[worker].get(name, 0.0)


class Session:
    """A ring and its tokenizer. Use as a context manager."""

    def __init__(
        self, store: Store, config: Config, plan: Plan, routes: Mapping[str, str] | None = None
    ) -> None:
        started = time.monotonic()
        self.store = store
        self.config = config
        self.plan = plan
        self.tokenizer = load_tokenizer(store)
        self.last: Generation | None = None
        self.token_seconds = TOKEN_SECONDS
        self.abandoned = False  # set, from any thread, by who will close the session next: nothing is drained
        self.live: dict[str, dict[str, float]] = {}  # every worker's latest counters
        self.live_seconds = 0.0  # renew `live` this often in mid-generation; 0: only at its end
        self._live_due = 0.0
        self.reuse_prefix = False  # see PROTOCOL.md, "Reuse of a prompt's beginning", for its price
        self._run = 0
        self.ring = Supervisor(store, config, plan, routes)
        self.load_seconds = time.monotonic() - started

    @classmethod
    def open(cls, store: Store, config: Config, plan: Plan) -> Session:
        """Start the ring; raises RingError if it does not come up."""
        return cls(store, config, plan)

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of `prompt`, by default with the special tokens that the tokenizer adds."""
        return list(self.tokenizer.encode(prompt, add_special_tokens=special).ids)

    def generate(self, prompt: str | Sequence[int], params: GenerationParams) -> Iterator[str]:
        """Yield pieces of text, never splitting a character.

        Leaving the iterator early cancels the generation and drains the ring. Raises UsageError for
        a prompt that is empty or does not fit the context.
        """
        return _texts(self.pieces(prompt, params))

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
        params.check()
        if not prompt:
            raise UsageError("the prompt is empty")
        ids = tuple(self.encode(prompt) if isinstance(prompt, str) else prompt)
        check_prompt(ids, self.store, self.plan)
        check_forced(params.forced, self.store)
        return self._stream(ids, params, cancelled)

    def _stream(
        self, ids: tuple[int, ...], params: GenerationParams, cancelled: Callable[[], bool]
    ) -> Generator[Piece, None, None]:
        self._run += 1
        run = self._run
        cached = self._cached(ids)
        generation = Generation(prompt=ids, cached=cached, before=self.ring.stats())
        self.last = generation
        room = self.plan.context - len(ids)
        self.ring.send(
            "compute",
            Generate(
                run=run,
                prompt=ids,
                max_new_tokens=min(params.max_new_tokens, room),
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                seed=params.seed,
                stop_tokens=() if params.ignore_eos else self.store.architecture.eos_tokens,
                forced=params.forced,
                cached=cached,
            ),
        )
        text = Detokenizer(self.tokenizer)
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
        """The ring's next message, or None once `cancelled`. Raises RingError after `patience` seconds."""
        deadline = time.monotonic() + patience
        while not cancelled():
            message = self.ring.receive(CANCEL_SECONDS)
            self._ask_for_live_stats()
            if message is not None:
                return message
            if time.monotonic() >= deadline:
                raise RingError(f"the ring was silent for {patience:.0f} s")
        return None

    def _ask_for_live_stats(self) -> None:
        now = time.monotonic()
        if self.live_seconds and now >= self._live_due:
            self._live_due = now + self.live_seconds
            self.ring.ask_stats()

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
        self.live = self.ring.stats()

    def summary(self) -> dict[str, Any]:
        """The cost of the last completed generation, as `--json` prints it."""
        done = self.last
        assert done is not None
        assert done.finished is not None
        tokens = len(done.tokens)
        decode = done.finished.decode_seconds
        decoded = max(1, tokens - 1)  # the first token comes out of the prefill
        bytes_decoded = done.delta("prefetcher", "decode_bytes")
        bytes_streamed = done.delta("prefetcher", "stream_bytes")
        hits, misses = done.delta("cache", "decode_hits"), done.delta("cache", "decode_misses")
        return {
            "text": done.text,
            "prompt_tokens": len(done.prompt),
            "generated_tokens": tokens,
            "finish_reason": done.finished.reason,
            "seconds": {
                "load": self.load_seconds,
                "prefill": done.finished.prefill_seconds,
                "decode": decode,
            },
            "token_seconds": [round(b - a, 6) for a, b in pairwise(done.moments)],
            "tokens_per_second": (tokens - 1) / decode if tokens > 1 and decode > 0 else 0.0,
            "flash": {
                "bytes_read": int(bytes_decoded + bytes_streamed),
                "reads": int(
                    done.delta("prefetcher", "decode_reads") + done.delta("prefetcher", "stream_reads")
                ),
                "bytes_per_token": bytes_decoded / decoded,
                "prefill_bytes": int(bytes_streamed),
                "gap_bytes": int(done.delta("prefetcher", "decode_gap_bytes")),
            },
            "cache": {
                "slots": self.plan.total_slots,
                "hits": int(hits),
                "misses": int(misses),
                "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
            },
            "memory": {"budget_bytes": None, "peak_bytes": self.ring.memory.bytes},
            "workers": [{"name": name, "pid": pid} for name, pid in self.ring.pids.items()],
            "audit": audit.of(done.delta, self.plan.layers) if self.config.compute.audit else None,
            "counters": {
                worker: {name: done.delta(worker, name) for name in values if not name.startswith("layer.")}
                for worker, values in done.after.items()
            },
            "notes": self.ring.notes,
            "config": self.config.model_dump(mode="json"),
        }

    def close(self) -> None:
        self.ring.stop()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _texts(pieces: Generator[Piece, None, None]) -> Iterator[str]:
    with contextlib.closing(pieces):
        for piece in pieces:
            if piece.text:
                yield piece.text


def check_prompt(ids: Sequence[int], store: Store, plan: Plan) -> None:
    """Raises UsageError for a prompt that is empty or that the model or the plan cannot hold."""
    if not ids:
        raise UsageError("the prompt is empty")
    _check_vocabulary("the prompt holds", ids, store)
    if len(ids) >= plan.context:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens, and the context of {plan.context:,} "
            "must also hold at least one new token; see --context"
        )


def check_forced(ids: Sequence[int], store: Store) -> None:
    """Raises UsageError for tokens to be decoded that are none of the model's."""
    _check_vocabulary("the tokens to decode hold", ids, store)


def _check_vocabulary(whose: str, ids: Sequence[int], store: Store) -> None:
    vocabulary = store.architecture.vocabulary
    bad = next((one for one in ids if not 0 <= one < vocabulary), None)
    if bad is not None:
        raise UsageError(f"{whose} token id {bad}, and the model's vocabulary has {vocabulary:,}")
