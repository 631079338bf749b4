"""A session and its supervisor without workers: how long they wait, and what they ask of a ring."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NoReturn

import pytest
from checkpoints import write_checkpoint
from ring import PROMPT, config, plan_for

from pipeline.ring.generation import GenerationParams
from pipeline.ring.grammar import Grammar
from pipeline.ring.messages import Cancel, Finished, Generate, Message, TokenReady
from pipeline.ring.session import PROMPT_TOKEN_SECONDS, TOKEN_SECONDS, Session
from pipeline.ring.supervisor import Supervisor
from storage.convert import convert
from storage.errors import RingError, UsageError
from storage.manifest import RESIDENT
from storage.store import Store

PARAMS = GenerationParams(max_new_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.mktemp("session")
    return convert(write_checkpoint(base / "checkpoint", "opt", "float16"), base / "store", name="small")


class ScriptedRing:
    """Says what is written down: messages, seconds of silence, things that happen; then it is silent."""

    def __init__(self) -> None:
        self.script: deque[Message | float | Callable[[], None]] = deque()
        self.sent: list[Message] = []
        self.now = 0.0  # the session's clock, seconds
        self.pids: dict[str, int] = {}
        self.memory = SimpleNamespace(sample=lambda now: None)

    def send(self, worker: str, message: Message) -> None:
        self.sent.append(message)

    def ask_stats(self) -> int:
        return 0

    def stats(self) -> dict[str, dict[str, float]]:
        return {}

    def receive(self, timeout: float) -> Message | None:
        said = self.script.popleft() if self.script else timeout
        if isinstance(said, Message):
            return said
        if isinstance(said, float):
            self.now += said
        else:
            said()
        return None


@pytest.fixture
def ring() -> ScriptedRing:
    return ScriptedRing()


@pytest.fixture
def session(store: Store, ring: ScriptedRing, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr("pipeline.ring.session.Supervisor", lambda *_: ring)
    monkeypatch.setattr("pipeline.ring.session.time", SimpleNamespace(monotonic=lambda: ring.now))
    chosen = config()
    return Session(store, chosen, plan_for(store, chosen))


def tokens(session: Session, prompt: list[int]) -> list[int]:
    return [piece.token for piece in session.pieces(prompt, PARAMS) if piece.token is not None]


def answer(run: int, *chosen: int) -> list[Message]:
    """What compute says of a run that is not disturbed."""
    said = [TokenReady(run, index, token, -1.0) for index, token in enumerate(chosen)]
    return [*said, Finished(run, "length", 0.0, 0.0)]


def test_a_long_prompt_may_keep_the_ring_silent_for_longer(session, ring):
    prompt = PROMPT * 10
    ring.script.extend([TOKEN_SECONDS + PROMPT_TOKEN_SECONDS * (len(prompt) - 1), *answer(1, 17, 40)])
    assert tokens(session, prompt) == [17, 40]


def test_after_the_first_token_the_prompt_gives_no_more_time(session, ring):
    ring.script.extend([TokenReady(1, 0, 17, -1.0), TOKEN_SECONDS + 1.0, *answer(1, 17, 40)])
    with pytest.raises(RingError, match=f"silent for {TOKEN_SECONDS:.0f} s"):
        tokens(session, PROMPT * 10)
    assert [type(message) for message in ring.sent] == [Generate], "of a hung ring nothing more is asked"


def test_an_interrupted_run_is_cancelled_and_its_leftovers_are_skipped(session, ring):
    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(session.pieces(PROMPT, PARAMS, interrupted))
    assert ring.sent[1:] == [Cancel(1)]
    assert ring.now == 0.0, "nothing is waited for"
    ring.script.extend([TokenReady(1, 0, 9, -1.0), Finished(1, "cancelled", 0.0, 0.0), *answer(2, 17, 40)])
    assert tokens(session, PROMPT) == [17, 40]


def test_an_abandoned_session_is_not_asked_to_end_its_run(session, ring):
    def interrupted() -> NoReturn:
        session.abandoned = True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(session.pieces(PROMPT, PARAMS, interrupted))
    assert [type(message) for message in ring.sent] == [Generate]


def test_a_session_abandoned_while_it_drains_waits_no_longer(session, ring):
    def abandon() -> None:
        session.abandoned = True

    ring.script.extend([TokenReady(1, 0, 17, -1.0), 30.0, abandon])
    pieces = session.pieces(PROMPT, PARAMS)
    next(pieces)
    pieces.close()
    assert ring.sent[1:] == [Cancel(1)]
    assert ring.now == 30.0


def test_more_new_tokens_than_a_message_can_hold_are_cut_to_the_context(session, ring):
    ring.script.extend(answer(1, 17))
    assert list(session.pieces(PROMPT, replace(PARAMS, max_new_tokens=2**64)))
    assert isinstance(ring.sent[0], Generate)
    assert ring.sent[0].max_new_tokens == session.plan.context - len(PROMPT)


class UnheardSupervisor(Supervisor):
    """Starts no workers, so that none says that it is ready."""

    def _start(self, *_: object) -> None:
        pass

    def receive(self, timeout: float | None = None) -> Message | None:
        return None


@pytest.mark.ring
def test_workers_get_the_time_in_which_a_slow_disk_gives_the_resident_weights(store):
    large = replace(store.manifest.files[RESIDENT], bytes=5_000_000_000)
    manifest = replace(store.manifest, files=store.manifest.files | {RESIDENT: large})
    chosen = config()
    with pytest.raises(RingError, match=r"no sign of life from cache and .* within 220 s of their start"):
        UnheardSupervisor(replace(store, manifest=manifest), chosen, plan_for(store, chosen))


FORM = Grammar("start: /a+/", ())


def test_an_answer_that_cannot_go_on_by_its_form_is_a_usage_error(session, ring):
    session.config = config(compute={"structured": True})
    ring.script.extend([TokenReady(1, 0, 9, -1.0), Finished(1, "failed", 0.0, 0.0, "it is too much")])
    wanted = GenerationParams(2, grammar=FORM)
    with pytest.raises(UsageError, match="it is too much"):
        list(session.pieces(PROMPT, wanted))
    assert ring.sent[0].grammar == FORM.text
    ring.script.extend(answer(2, 17, 40))
    assert tokens(session, PROMPT) == [17, 40], "the ring is as it was"


def test_without_memory_for_it_an_answer_of_a_form_is_refused(session, ring):
    with pytest.raises(UsageError, match=r"compute\.structured"):
        list(session.pieces(PROMPT, GenerationParams(2, grammar=FORM)))
    assert ring.sent == []
