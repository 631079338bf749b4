"""Sessions without a ring, for tests of serving: a fast one, and one per kind of misbehaviour."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Sequence

from pipeline.errors import ContextExceeded
from pipeline.ring.generation import Generation, GenerationParams, Piece
from pipeline.ring.messages import Finished
from pipeline.ring.sampling import Sampling
from pipeline.ring.text import AddedToken
from storage.errors import RingError, UsageError

CONTEXT = 4096


def word(prompt: Sequence[int], params: GenerationParams, index: int) -> tuple[int, str]:
    """Token and text that the fake writes: they depend on everything that a ring's would."""
    how = params.sampling
    key = f"{list(prompt)} {how.seed} {how.temperature} {how.top_k} {how.top_p} {index}"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "big")
    return number, f" w{number}"


def text_of(prompt: str, *, max_new_tokens: int = 200, **sampling: float) -> str:
    """The fake's whole answer."""
    params = GenerationParams(max_new_tokens, Sampling(**sampling))  # type: ignore[arg-type]
    ids = list(prompt.encode())
    return "".join(word(ids, params, index)[1] for index in range(params.max_new_tokens))


class FastSession:
    """Answers at once."""

    def __init__(self) -> None:
        self.last: Generation | None = None
        self.abandoned = False
        self.live: dict[str, dict[str, float]] = {
            "cache": {"decode_hits": 30.0, "decode_misses": 10.0},
            "prefetcher": {"decode_bytes": 1000.0, "stream_bytes": 500.0},
        }
        self.live_seconds = 0.0
        self.added_tokens: dict[str, AddedToken] = {}
        self.prompts: list[list[int]] = []
        self.closed = False
        self.runs = 0

    def view(self) -> dict[str, float | None]:
        return {"memory_bytes": 5000, "budget_bytes": None, "prompt": None}

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        return list(prompt.encode())

    def pieces(
        self,
        prompt: str | Sequence[int],
        params: GenerationParams,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[Piece, None, None]:
        params.check()
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) >= CONTEXT:
            raise ContextExceeded("the prompt does not fit the context")
        return self._stream(ids, params, cancelled)

    def _stream(
        self, ids: list[int], params: GenerationParams, cancelled: Callable[[], bool]
    ) -> Generator[Piece, None, None]:
        self.runs += 1
        self.prompts.append(ids)
        self.last = Generation(prompt=tuple(ids))
        reason = "cancelled"
        try:
            for index in range(min(params.max_new_tokens, CONTEXT - len(ids))):
                if cancelled():
                    return
                self.before_token(index, cancelled)
                token, text = word(ids, params, index)
                self.last.tokens.append(token)
                yield Piece(token, text, -0.5)
            reason = "length"
        finally:
            self.last.finished = Finished(self.runs, reason, 0.01, 0.02)

    def before_token(self, index: int, cancelled: Callable[[], bool]) -> None:
        """For sessions that misbehave."""

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class GatedSession(FastSession):
    """Gives a token only when the test lets it; a cancelled run needs no permission."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = threading.Semaphore(0)
        self.started = threading.Event()

    def before_token(self, index: int, cancelled: Callable[[], bool]) -> None:
        self.started.set()
        while not self.permits.acquire(timeout=0.01):
            if cancelled():
                return

    def let(self, tokens: int) -> None:
        self.permits.release(tokens)


class DyingSession(FastSession):
    """Its ring dies before the third token."""

    def before_token(self, index: int, cancelled: Callable[[], bool]) -> None:
        if index == 2:
            raise RingError("the cache worker (pid 7) was killed by SIGKILL")


class DeadSession(FastSession):
    """Its ring is found dead while idle."""

    def check(self) -> None:
        raise RingError("the prefetcher worker (pid 8) was killed by SIGKILL")


class BuggySession(FastSession):
    """Raises what nobody expects."""

    def before_token(self, index: int, cancelled: Callable[[], bool]) -> None:
        raise ZeroDivisionError("a bug")
