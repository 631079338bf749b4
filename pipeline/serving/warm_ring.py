"""One ring kept warm: answers requests one after the other, and starts again after a death.

This is what serving (`scheduler.py`) and embedding (`embed.py`) have in common. All methods belong
to one thread, except `stats`, `view`, `abandon` and `live_seconds`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Protocol

from pipeline.config import Decoding
from pipeline.errors import DeadlineExceeded, RingGaveUp
from pipeline.ring.generation import Generation, GenerationParams, Piece
from pipeline.ring.grammar import Grammar, Schema
from pipeline.ring.text import AddedToken
from pipeline.serving.calls import Tools
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.client_messages import CANCELLED, Done, Submit, SubmitStructured, Token
from pipeline.serving.stopping import StopStrings
from storage.errors import DamagedStore, RingError, UsageError

DEATHS, DEATHS_SECONDS = 3, 60.0  # this many deaths within this time, and the ring stays down
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # stop strings of one request, characters of each


class RunningSession(Protocol):
    """What is needed of `session.Session`."""

    last: Generation | None
    abandoned: bool
    live: dict[str, dict[str, float]]
    live_seconds: float

    def encode(self, prompt: str, *, special: bool = True) -> list[int]: ...

    @property
    def added_tokens(self) -> Mapping[str, AddedToken]: ...

    def pieces(
        self, prompt: str | Sequence[int], params: GenerationParams, cancelled: Callable[[], bool] = ...
    ) -> Generator[Piece, None, None]: ...

    def check(self) -> None: ...

    def view(self) -> dict[str, float | None]: ...

    def close(self) -> None: ...


class WarmRing:
    """A session that is opened again when its ring dies."""

    def __init__(
        self,
        open_session: Callable[[], RunningSession],
        template: ChatTemplate | None = None,
        defaults: Decoding | None = None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
        state: Callable[[], object] = lambda: None,
    ) -> None:
        """Starts the ring; raises what `open_session` raises.

        `defaults` fill what requests leave out; `say` gets a line for deaths and restarts. `state` is another
        value once somebody has written to the store: a damaged one is tried again then, and no sooner.
        """
        self._open = open_session
        self._state = state
        self._damaged_state: object = None
        self.damage = ""  # what is wrong with the store, in a sentence
        self._clock = clock
        self._say = say
        self.template = template
        self._defaults = defaults or Decoding()
        self.deaths = 0
        self._recent: deque[float] = deque(maxlen=DEATHS)
        self.live_seconds = 0.0  # renew the counters this often in mid-generation; 0: at its end
        self._epitaph = ""
        self._down_since = 0.0
        self._session: RunningSession | None = open_session()

    @property
    def is_up(self) -> bool:
        return self._session is not None

    @property
    def session(self) -> RunningSession | None:
        return self._session

    def stats(self) -> dict[str, dict[str, float]]:
        """Every worker's latest counters; may be called from any thread."""
        session = self._session
        return dict(session.live) if session is not None else {}

    def view(self) -> dict[str, float | None]:
        """`Session.view` of the session that runs; may be called from any thread."""
        session = self._session
        return session.view() if session is not None else {}

    def answer(
        self,
        submit: Submit,
        cancelled: Callable[[], bool] = lambda: False,
        queue_seconds: float = 0.0,
        tools: Tools | None = None,
    ) -> Generator[Token | Done, None, None]:
        """Yield the request's tokens and then `Done`. The text calls `tools` in the model's own form.

        Leaving early, or `cancelled` turning true, frees the ring at the next token. Raises
        UsageError for a request that cannot be answered, and RingError when the ring dies: then the
        next call starts it again. Raises RingGaveUp when that has happened too often, and DamagedStore when
        the store is not what was written: then every call does, until somebody has mended it.
        """
        session = self.revive()
        session.live_seconds = self.live_seconds
        prompt = self._prompt(session, submit, tools)
        params = self._params(submit, _grammar(session, submit, tools))
        stops = _stop_strings(submit)
        try:
            yield from self._stream(session, submit, prompt, params, stops, cancelled, queue_seconds)
        except RingError as error:
            raise self._died(error) from error

    def _stream(
        self,
        session: RunningSession,
        submit: Submit,
        prompt: str | list[int],
        params: GenerationParams,
        stops: StopStrings,
        cancelled: Callable[[], bool],
        queue_seconds: float,
    ) -> Generator[Token | Done, None, None]:
        index = 0
        rest = ""
        with closing(session.pieces(prompt, params, cancelled)) as pieces:
            for piece in pieces:
                session.live_seconds = self.live_seconds
                text = stops.push(piece.text)
                if piece.token is None:
                    rest = text
                    break
                yield Token(submit.request, index, piece.token, text, piece.logprob)
                index += 1
                if stops.found:
                    break
        rest += stops.finish()
        if rest:
            yield Token(submit.request, index, None, rest, 0.0)
        yield _done(submit, session.last, stops.found, queue_seconds)

    def _prompt(self, session: RunningSession, submit: Submit, tools: Tools | None) -> str | list[int]:
        """What the session is given: text, or token ids."""
        given = (submit.prompt is not None) + bool(submit.tokens) + bool(submit.messages)
        if given != 1:
            raise UsageError("a request needs exactly one of a prompt, token ids and chat messages")
        if submit.prompt is not None:
            return submit.prompt
        if submit.tokens:
            return list(submit.tokens)
        if self.template is None:
            raise UsageError("this model has no chat template; send a prompt instead of chat messages")
        # The template writes the special tokens itself.
        text = self.template.render(submit.messages, () if tools is None else tools.shown)
        return session.encode(text, special=False)

    def _params(self, submit: Submit, grammar: Grammar | None) -> GenerationParams:
        asked = {name: getattr(submit, name) for name in Decoding.model_fields}
        wanted = self._defaults.model_copy(
            update={name: value for name, value in asked.items() if value is not None}
        )
        return GenerationParams(
            wanted.max_new_tokens,
            wanted.with_seed(submit.seed),
            ignore_eos=submit.ignore_eos,
            grammar=grammar,
        )

    def revive(self) -> RunningSession:
        """The running session, started again if the ring has died.

        Raises RingError when it does not come up, DamagedStore where the store is why, and RingGaveUp when it
        has died too often.
        """
        if self.damage:
            if self._state() == self._damaged_state:
                raise DamagedStore(self.damage)
            self.damage = ""
            self._say("the store has been written to: the ring is started again")
        if len(self._recent) == DEATHS and self._recent[-1] - self._recent[0] <= DEATHS_SECONDS:
            raise RingGaveUp(self._epitaph)
        if self._session is None:
            try:
                self._session = self._open()
            except RingError as error:
                raise self._died(error) from error
            self._say(f"the ring runs again, {self._clock() - self._down_since:.1f} s after it went down")
        return self._session

    def check(self) -> None:
        """Between requests: raises RingError or RingGaveUp if the ring has died meanwhile."""
        if self._session is None:
            return
        try:
            self._session.check()
        except RingError as error:
            raise self._died(error) from error

    def _died(self, error: RingError) -> RingError:
        """Count a death and close what is left; the error to raise.

        A damaged store is no death: to start again would not help, and to end would not say why.
        """
        if isinstance(error, DamagedStore):
            self.close()
            self.damage, self._damaged_state = str(error), self._state()
            self._say(f"{error}; until then requests are refused")
            return error
        self.deaths += 1
        self._recent.append(self._clock())
        self.close()
        recent = sum(self._recent[-1] - moment <= DEATHS_SECONDS for moment in self._recent)
        gives_up = recent == DEATHS
        then = "it stays down" if gives_up else "it is started again"
        self._say(f"the ring died: {error}; death {recent} within {DEATHS_SECONDS:.0f} s, {then}")
        if not gives_up:
            return error
        self._epitaph = (
            f"the ring died {DEATHS} times within {DEATHS_SECONDS:.0f} s, the last time because {error}"
        )
        return RingGaveUp(self._epitaph)

    def abandon(self) -> None:
        """`close` comes next: a run that is being ended is no longer waited for. From any thread."""
        session = self._session
        if session is not None:
            session.abandoned = True

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._down_since = self._clock()
            session.close()


def allowed_seconds(submit: Submit, longest: float = math.inf) -> float:
    """What a request may take, waiting included. Raises UsageError for a deadline that is no such time."""
    if not submit.deadline >= 0.0:  # also for NaN
        raise UsageError("deadline must be zero or a positive number of seconds")
    return min(submit.deadline or longest, longest)


def deadline_passed(seconds: float) -> DeadlineExceeded:
    """How a request ends that has taken them all."""
    return DeadlineExceeded(f"the request's deadline of {seconds:g} s has passed")


def _grammar(session: RunningSession, submit: Submit, tools: Tools | None) -> Grammar | None:
    """What the answer must be; None: anything. Raises UsageError."""
    schema = None
    if isinstance(submit, SubmitStructured):
        schema = Schema.of("the JSON schema", submit.json_schema)
    if tools is not None:
        return tools.grammar(session.added_tokens, schema)
    return None if schema is None else Grammar.of_schema(schema)


def _stop_strings(submit: Submit) -> StopStrings:
    if len(submit.stop) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in submit.stop):
        raise UsageError(f"at most {MAX_STOPS} stop strings of {MAX_STOP_LENGTH} characters each")
    return StopStrings(submit.stop)


def _done(submit: Submit, last: Generation | None, stopped: bool, queue_seconds: float) -> Done:
    assert last is not None
    finished = last.finished
    reason = finished.reason if finished is not None else CANCELLED
    return Done(
        request=submit.request,
        reason="stop" if stopped else reason,
        prompt_tokens=len(last.prompt),
        generated_tokens=len(last.tokens),
        cached_tokens=last.cached,
        queue_seconds=queue_seconds,
        prefill_seconds=finished.prefill_seconds if finished is not None else 0.0,
        decode_seconds=finished.decode_seconds if finished is not None else 0.0,
    )
