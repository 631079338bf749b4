"""Generations: from a prompt to its tokens, one step after the other, in a thread of its own.

A step embeds its tokens, runs them through the layers (`blocks.run`) with the units that the ring brings
(`ring_units.py`), and gives logits. The first step of a run is its prefill, whatever its length. Those that
follow have one token, and where the plan has room for them, drafts behind it (`drafts/steps.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ring.channel import Channel
from pipeline.ring.messages import Cancel, Finished, Generate, TokenReady
from pipeline.ring.plan import Plan
from pipeline.ring.sampling import Sampling
from pipeline.ring.segments import Segments
from pipeline.ring.timeline import Timeline
from storage.architecture import Architecture
from storage.codecs import F32
from storage.errors import StoreCorrupt
from workers.compute.audit import Audit
from workers.compute.blocks import run
from workers.compute.constraint import Constraint, Constraints, Unfollowable
from workers.compute.device import Device
from workers.compute.drafts.source import Source
from workers.compute.drafts.steps import Steps
from workers.compute.drafts.worth import Worth
from workers.compute.ring_units import Cancelled, RingUnits
from workers.compute.sampling import choose, log_probability
from workers.compute.shadow import Shadow


class Engine:
    """Runs generations. `generate` belongs to one thread; `cancel`, `stop`, `seconds`, `counts` to any."""

    def __init__(
        self,
        architecture: Architecture,
        device: Device[Any],
        plan: Plan,
        segments: Segments,
        channel: Channel,
        audit: Audit | None = None,
        constraints: Constraints | None = None,
        timeline: Timeline | None = None,
        shadow: Shadow[Any] | None = None,
        drafts: Source | None = None,
        even_forced: bool = False,
        hits_first: bool = True,
    ) -> None:
        """`constraints`: of the model's tokenizer; without them no request has a grammar.

        `shadow`: of a forecast that is shadowed. `drafts` are used where plan and device have room for them,
        with forced tokens only if `even_forced`. `hits_first`: as the cache's configuration has it.
        """
        self._architecture = architecture
        self._device = device
        self._plan = plan
        self._channel = channel
        self._constraints = constraints
        most = min(plan.drafts, device.rows - 1)
        self._drafts = drafts if most else None
        self._even_forced = even_forced
        self._worth = Worth(most)
        self._cancelled = -1  # the run that was last asked to end
        self._units = RingUnits(
            device,
            plan,
            segments,
            channel,
            audit,
            self._is_cancelled,
            timeline or Timeline(),
            shadow,
            hits_first,
        )
        self._shadow = shadow
        self.seconds, self.counts = self._units.seconds, self._units.counts

    # -- from other threads ---------------------------------------------------------------------

    def cancel(self, message: Cancel) -> None:
        """End that run at the next token, or between layers of its prefill."""
        self._cancelled = message.run

    def stop(self) -> None:
        """Leave `generate` with Stopped at the next wait."""
        self._units.stopped = True

    # -- one generation -------------------------------------------------------------------------

    def generate(self, request: Generate) -> None:
        """Answer `request` with its tokens and `Finished`. Raises Stopped when the ring ends.

        A stop token ends the run and is not reported; forced tokens are reported whatever they are.
        """
        started = time.monotonic()
        decoding: float | None = None
        reason, error = "length", ""
        try:
            constraint = self._constraint(request)
            if request.max_new_tokens > 0 and len(request.prompt) <= self._plan.context:
                if self._is_cancelled(request.run):
                    raise Cancelled
                logits = self._prefill(request)
                decoding = time.monotonic()
                reason = self._decode(request, logits, constraint)
        except Cancelled:
            reason = "cancelled"
        except Unfollowable as problem:
            reason, error = "failed", str(problem)
        ended = time.monotonic()
        between = ended if decoding is None else decoding
        finished = Finished(request.run, reason, between - started, ended - between, error)
        self._channel.send("supervisor", finished)

    def _is_cancelled(self, run: int) -> bool:
        return self._cancelled == run

    def _constraint(self, request: Generate) -> Constraint | None:
        """What holds the answer to its grammar; None where it has none. Raises Unfollowable."""
        if not request.grammar:
            return None
        assert self._constraints is not None
        started = time.perf_counter()
        constraint = self._constraints.of(request.grammar, request.stop_tokens)
        self.seconds["grammar"] += time.perf_counter() - started
        return constraint

    def _prefill(self, request: Generate) -> F32:
        """Run the prompt behind its cached tokens in one pass; returns the last token's logits."""
        started = time.monotonic()
        tokens = request.prompt[request.cached :]
        x = self._forward(request.run, tokens, request.cached, every=True)
        logits: F32 = self._device.logits(x[-1:])[0]
        self.seconds["prefill"] += time.monotonic() - started
        self.counts["prefill_tokens"] += len(tokens)
        return logits

    def _decode(self, request: Generate, logits: F32, constraint: Constraint | None) -> str:
        """Report tokens until one of the run's ends; returns which. Raises StoreCorrupt and Unfollowable."""
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        steps = self._steps(request, sampling)
        try:
            return self._choose(request, sampling, logits, constraint, steps)
        finally:
            steps.end()

    def _steps(self, request: Generate, sampling: Sampling) -> Steps:
        """Those behind the prompt."""
        drafts = self._drafts if self._even_forced or not request.forced else None
        if drafts is not None:
            drafts.begin(request.prompt, sampling)

        def forward(tokens: Sequence[int], position: int) -> Any:
            return self._forward(request.run, tokens, position, every=False)

        return Steps(request.prompt, forward, self._row_logits, self.counts, drafts, self._worth)

    def _row_logits(self, x: Any) -> F32:
        started = time.perf_counter()
        logits: F32 = self._device.logits(x)[0]
        self.seconds["head"] += time.perf_counter() - started
        return logits

    def _choose(
        self,
        request: Generate,
        sampling: Sampling,
        logits: F32,
        constraint: Constraint | None,
        steps: Steps,
    ) -> str:
        position = len(request.prompt)
        for index in range(request.max_new_tokens):
            if not np.isfinite(logits).all():
                raise StoreCorrupt(
                    "the logits are not finite: the weights are damaged, which `run.py verify STORE` finds, "
                    "or were before they were converted"
                )
            forced = index < len(request.forced)
            allowed = None if constraint is None else self._allowed(constraint)
            token = request.forced[index] if forced else choose(logits, sampling, index, allowed)
            if self._is_cancelled(request.run):
                return "cancelled"
            if token in request.stop_tokens and not forced:
                return "stop"
            self._channel.send(
                "supervisor", TokenReady(request.run, index, token, log_probability(logits, token))
            )
            self._units.told(index)
            self.counts["tokens"] += 1
            if constraint is not None and self._take(constraint, token):
                return "stop"  # nothing can follow: an end token would only cost another step
            if index + 1 == request.max_new_tokens or position + index >= self._plan.context:
                return "length"
            room = min(request.max_new_tokens - index - 2, self._plan.context - position - index - 1)
            logits = steps.after(token, room)
        return "length"

    def _allowed(self, constraint: Constraint) -> npt.NDArray[np.intp]:
        started = time.perf_counter()
        allowed = constraint.allowed()
        self.seconds["mask"] += time.perf_counter() - started
        self.counts["masks"] += 1
        return allowed

    def _take(self, constraint: Constraint, token: int) -> bool:
        started = time.perf_counter()
        whole = constraint.take(token)
        self.seconds["mask"] += time.perf_counter() - started
        return whole

    def _forward(self, run_number: int, tokens: Sequence[int], first: int, every: bool) -> Any:
        """The last layer's output [rows, d_model] for tokens of which the first has position `first`."""
        self._units.embedding(every, len(tokens))
        self._device.begin(first, len(tokens), every)
        x = self._device.embed(np.array(tokens))
        self._units.begin(run_number, first, every, x)
        return run(self._architecture, self._device, x, self._units, self._plan.forecast.early)

    def close(self) -> None:
        """Give the threads and memory of device and drafts back."""
        self._device.close()
        if self._drafts is not None:
            self._drafts.close()
        if self._shadow is not None:
            self._shadow.close()
