"""One generation: what is asked of a ring, what comes token by token, and what is known afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.ring.grammar import Grammar
from pipeline.ring.messages import Finished
from pipeline.ring.sampling import Sampling
from storage.errors import UsageError


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How to decode."""

    max_new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    forced: tuple[int, ...] = ()  # these tokens instead of sampled ones, for measurements
    grammar: Grammar | None = None  # what the answer must be; None: anything

    def check(self) -> None:
        """Raises UsageError naming the first value out of range."""
        if self.max_new_tokens < 1:
            raise UsageError("max_new_tokens must be at least 1")
        self.sampling.check()
        if self.grammar is None:
            return
        if self.ignore_eos:
            raise UsageError(
                "an answer of a given form ends where it is whole: ignore_eos does not go with it"
            )
        if self.forced:
            raise UsageError("an answer of a given form is chosen by the model, not forced")
        self.grammar.check()


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
    before: dict[str, dict[str, float]] = field(default_factory=dict)  # every worker's counters
    after: dict[str, dict[str, float]] = field(default_factory=dict)

    def delta(self, worker: str, name: str) -> float:
        """A counter's growth over this generation."""
        return self.after[worker].get(name, 0.0) - self.before[worker].get(name, 0.0)
