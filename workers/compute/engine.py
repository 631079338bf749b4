"""The layer loop: one token's way through the layers, on blocking sockets in a thread of its own.

A step embeds its tokens, and for every layer computes attention, announces the FFN's input, waits
for the bundles and sums them. The first step of a run is its prefill, whatever its length.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.ring.channel import Channel
from pipeline.ring.messages import (
    EMBEDDING,
    Cancel,
    Finished,
    Generate,
    HiddenReady,
    Message,
    PartDone,
    TokenReady,
)
from pipeline.ring.plan import Plan
from pipeline.ring.segments import ID, SLOT, Segments
from storage.errors import StoreCorrupt
from storage.format import CARRIER
from workers.compute.audit import Audit
from workers.compute.batch import BatchFfn, BatchOperations, Workers
from workers.compute.blocks import after_ffn, before_ffn
from workers.compute.parts import Part, Parts
from workers.compute.sampling import Sampling, choose, log_probability
from workers.compute.token import TokenFfn, TokenOperations
from workers.compute.weights import Weights

F32 = npt.NDArray[np.float32]

_PHASES = ("attention", "waiting", "ffn", "head", "audit", "prefill_waiting")
_PATIENCE = 0.2  # seconds between looks at `stop` while waiting for parts


class Stopped(Exception):
    """The ring ends while a layer is awaited."""


class _Cancelled(Exception):
    """The run was cancelled during its prefill; the ring is drained."""


class _Clock:
    """Adds the time of each `with` block to a phase's seconds; cheaper than a generator's."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] += time.perf_counter() - self._started


class Engine:
    """Runs generations. `generate` belongs to one thread; `cancel`, `stop` and `seconds` to any."""

    def __init__(
        self,
        weights: Weights,
        plan: Plan,
        segments: Segments,
        channel: Channel,
        threads: int,
        audit: Audit | None = None,
    ) -> None:
        self._audit = audit
        self._plan = plan
        self._segments = segments
        self._channel = channel
        self._bundles = segments.bundles.view(CARRIER[weights.dtype])  # [slots, stride in elements]
        self._architecture = weights.architecture
        self._token = TokenOperations(weights, plan.context, threads, plan.cache_dtype)
        self._workers = Workers(threads)
        self._batch = BatchOperations(weights, self._workers, self._keep, self._kept)
        self._parts = Parts(self._receive)
        self._run = 0
        self._step = -1  # of the ring's life
        self._done = -1  # tick of the last finished FFN
        self._cancelled = -1  # the run that was last asked to end
        self._stopped = False
        self.seconds: dict[str, float] = defaultdict(float)  # per phase, since the start
        self._clocks = {phase: _Clock(self.seconds, phase) for phase in _PHASES}
        self.counts: dict[str, float] = defaultdict(float)
        self._active_names = [f"layer.{index}.active" for index in range(plan.layers)]

    # -- from other threads ---------------------------------------------------------------------

    def cancel(self, message: Cancel) -> None:
        """End that run at the next token, or between layers of its prefill."""
        self._cancelled = message.run

    def stop(self) -> None:
        """Leave `generate` with Stopped at the next wait."""
        self._stopped = True

    # -- one generation -------------------------------------------------------------------------

    def generate(self, request: Generate) -> None:
        """Answer `request` with its tokens and `Finished`. Raises Stopped when the ring ends.

        A stop token ends the run and is not reported; forced tokens are reported whatever they are.
        """
        self._run = request.run
        started = time.monotonic()
        decoding: float | None = None
        reason = "length"
        try:
            if request.max_new_tokens > 0 and len(request.prompt) <= self._plan.context:
                if self._cancelled == request.run:
                    raise _Cancelled
                logits = self._prefill(request.prompt, request.cached)
                decoding = time.monotonic()
                reason = self._decode(request, logits)
        except _Cancelled:
            reason = "cancelled"
        ended = time.monotonic()
        between = ended if decoding is None else decoding
        self._channel.send("supervisor", Finished(request.run, reason, between - started, ended - between))

    def _decode(self, request: Generate, logits: F32) -> str:
        """Report tokens until one of the run's ends; returns which. Raises StoreCorrupt."""
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        position = len(request.prompt)
        for index in range(request.max_new_tokens):
            if not np.isfinite(logits).all():
                raise StoreCorrupt(
                    "the logits are not finite: the weights are damaged, which `run.py verify STORE` finds, "
                    "or were before they were converted"
                )
            forced = index < len(request.forced)
            token = request.forced[index] if forced else choose(logits, sampling, index)
            if self._cancelled == request.run:
                return "cancelled"
            if token in request.stop_tokens and not forced:
                return "stop"
            self._channel.send(
                "supervisor", TokenReady(request.run, index, token, log_probability(logits, token))
            )
            self.counts["tokens"] += 1
            if index + 1 == request.max_new_tokens or position + index >= self._plan.context:
                return "length"
            logits = self._forward(token, position + index)
        return "length"

    # -- one step -------------------------------------------------------------------------------

    def _forward(self, token: int, position: int) -> F32:
        """Decode one token; returns logits [vocabulary]."""
        self._step += 1
        operations = self._token
        operations.position = position
        if self._audit is not None:
            self._audit.next_token()
        x = operations.embed(token)
        self._announce(EMBEDDING, x[None], stream=False)
        for index in range(self._plan.layers):
            with self._clocks["attention"]:
                residual, ffn_input = before_ffn(
                    self._architecture,
                    operations,
                    index,
                    x,
                    lambda hidden, index=index: self._announce(index, hidden[None], stream=False),  # type: ignore[misc]
                    self._plan.early,
                )
            ffn = TokenFfn(operations, index, ffn_input, self._bundles, self._segments.active[index])
            neurons = 0
            for part in self._arriving(index):
                neurons += part.count
                with self._clocks["ffn"]:
                    ffn.add(part.count)
                    if part.closes:
                        ffn.close()
                self._answer(index, part)
            if self._audit is not None and self._audit.layer == index:
                with self._clocks["audit"]:
                    computed = self._segments.active[index, ID, :neurons]
                    self._audit.look(ffn_input, computed, ffn.output, self.counts)
            self._finish(index)
            self.counts[self._active_names[index]] += ffn.active
            self.counts["active"] += ffn.active
            x = after_ffn(self._architecture, operations, index, residual, ffn.output)
        with self._clocks["head"]:
            return operations.logits(x)

    def _prefill(self, prompt: Sequence[int], cached: int = 0) -> F32:
        """Run the prompt behind its first `cached` tokens in one pass; returns the last token's logits."""
        self._step += 1
        operations = self._batch
        operations.past = cached
        started = time.monotonic()
        x = operations.embed(np.array([prompt[cached:]]))
        self._announce(EMBEDDING, x[0], stream=True)
        for index in range(self._plan.layers):
            residual, ffn_input = before_ffn(
                self._architecture,
                operations,
                index,
                x,
                lambda hidden, index=index: self._announce(index, hidden[0], stream=True),  # type: ignore[misc]
                self._plan.early,
            )
            ffn = BatchFfn(operations, index, ffn_input[0])
            # A segment's parts come in any order of ids, and segments ascend.
            segment: list[Part] = []
            for part in self._arriving(index, "prefill_waiting"):
                segment.append(part)
                if part.closes:
                    ffn.add(*self._merged(index, segment), self._bundles)
                    segment = []
                self._answer(index, part)
            self._finish(index)
            x = after_ffn(self._architecture, operations, index, residual, ffn.finish()[None])
            if self._cancelled == self._run:
                self._drain(index)
                raise _Cancelled
        logits = self._token.logits(x[0, -1])
        self.seconds["prefill"] += time.monotonic() - started
        self.counts["prefill_tokens"] += len(prompt) - cached
        return logits

    def _keep(self, index: int, keys: F32, values: F32) -> None:
        """Put a prompt's keys and values, [1, kv_heads, tokens, head_dim], into the cache."""
        self._token.cache.put(index, self._batch.past, keys[0], values[0])

    def _kept(self, index: int) -> tuple[F32, F32]:
        """The cache's keys and values before the batch, [1, kv_heads, past, head_dim] each."""
        keys, values = self._token.cache.past(index, self._batch.past)
        return keys[None], values[None]

    # -- the ring -------------------------------------------------------------------------------

    def _announce(self, layer: int, hidden: F32, stream: bool) -> None:
        """Write the last rows of `hidden` [tokens, d_model] and tell the predictor."""
        rows = min(hidden.shape[0], self._plan.hidden_rows)
        self._segments.hidden[layer + 1, :rows] = hidden[-rows:]
        self._channel.send("predictor", HiddenReady(self._run, self._step, layer, rows, stream, self._done))

    def _arriving(self, layer: int, phase: str = "waiting") -> Iterator[Part]:
        """The layer's parts, counting the time spent waiting as the phase's."""
        parts = self._parts.of(self._step, layer)
        while True:
            with self._clocks[phase]:
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _neurons(self, layer: int, part: Part) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Ids, ascending, and slots of a part."""
        table = self._segments.active[layer, :, part.start : part.start + part.count]
        return table[ID], table[SLOT]

    def _merged(self, layer: int, segment: list[Part]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Ids, ascending, and slots of all parts of a segment."""
        tables = [self._neurons(layer, part) for part in segment]
        ids = np.concatenate([table[0] for table in tables])
        slots = np.concatenate([table[1] for table in tables])
        order = np.argsort(ids, kind="stable")
        return ids[order], slots[order]

    def _answer(self, layer: int, part: Part) -> None:
        """Give the staging half back, where the part used one."""
        if part.staged and part.closes:
            self._channel.send("cache", PartDone(self._run, self._step, layer, part.number))

    def _finish(self, layer: int) -> None:
        self._done = self._step * self._plan.layers + layer

    def _drain(self, layer: int) -> None:
        """Receive, computing nothing, what the announcements up to `layer` of a prefill will bring."""
        last = min(self._plan.layers - 1, layer + max(1, self._plan.lookahead))
        for index in range(layer + 1, last + 1):
            for part in self._arriving(index, "prefill_waiting"):
                self._answer(index, part)
            self._finish(index)

    def _receive(self) -> Message:
        while not self._stopped:
            message = self._channel.receive("compute", _PATIENCE)
            if message is not None:
                return message
        raise Stopped

    def close(self) -> None:
        """End the pool's threads."""
        self._workers.close()
