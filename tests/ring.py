"""Rings for tests: a small store, a plan with a given number of slots, and what a generation gave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.planner.divide import plan as make_plan
from pipeline.ring.channel import Channel
from pipeline.ring.generation import GenerationParams
from pipeline.ring.messages import Message
from pipeline.ring.plan import Plan
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from storage.store import Store

PROMPT = [2, 17, 40, 9, 77, 31]


def config(**sections: Mapping[str, Any]) -> Config:
    """The default configuration with few threads and small staging, and these changes."""
    base: dict[str, dict[str, Any]] = {
        "predictor": {"kind": "oracle", "lookahead": 1, "refine": True},
        "cache": {"share": 0.25},  # so that there is something to read
        "compute": {"threads": 1, "context": 128},
        "prefetcher": {"readers": 1, "queue_depth": 16},
    }
    for name, changes in sections.items():
        base.setdefault(name, {}).update(changes)
    return Config.parse(base)


def plan_for(store: Store, chosen: Config, slots: int | None = None, staging: int | None = None) -> Plan:
    """The planner's plan, with other slots per layer or staging slots where given."""
    plan = make_plan(store, chosen).plan
    if slots is not None:
        plan = replace(plan, slots=(slots,) * plan.layers)
    if staging is not None:
        plan = replace(plan, staging=staging)
    return plan


@dataclass(frozen=True)
class Outcome:
    """What must not depend on anything but the model, the prompt and the predicted set."""

    tokens: list[int]
    logprobs: list[float]


def alike(found: Outcome, expected: Outcome) -> bool:
    """Whether two sets that differ in neurons of no effect wrote the same.

    The kernels' bits are the same then; torch's sums hang on which products there are.
    """
    if Config().compute.device == "cpu":
        return found == expected
    return found.tokens == expected.tokens and bool(np.allclose(found.logprobs, expected.logprobs, atol=1e-4))


def generate(
    session: Session,
    count: int = 24,
    prompt: list[int] | None = None,
    forced: tuple[int, ...] = (),
    **sampling: Any,
) -> Outcome:
    """Decode `count` tokens, never stopping early."""
    wanted = GenerationParams(count, Sampling(**sampling), ignore_eos=True, forced=forced)
    for _ in session.generate(prompt or PROMPT, wanted):
        pass
    assert session.last is not None
    return Outcome(session.last.tokens, session.last.logprobs)


def outcome(store: Store, chosen: Config, slots: int | None = None, staging: int | None = None) -> Outcome:
    """One generation in a ring of its own."""
    with Session(store, chosen, plan_for(store, chosen, slots, staging)) as session:
        return generate(session)


@contextmanager
def tap(
    session_directory: Any, inboxes: tuple[str, ...], handle: Callable[[str, Message, Channel], None]
) -> Iterator[None]:
    """Listen in: receive for `tap-NAME` of every inbox and hand (NAME, message, channel) on."""
    channel = Channel(session_directory, tuple(f"tap-{name}" for name in inboxes))
    ended = threading.Event()

    def relay() -> None:
        while not ended.is_set():
            for name in inboxes:
                message = channel.receive(f"tap-{name}", 0.001)
                if message is not None:
                    handle(name, message, channel)
        channel.close()

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
