"""A conversation with a warm ring: its messages so far, and one turn at a time.

What has been said is in the prompt of every turn, so a ring that reuses prefixes computes only what is new.
Nothing here reads or writes: `commands/chat.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import count

from pipeline.serving.answer import ChatMessage, RequestOptions, submission
from pipeline.serving.chat import ChatTemplate
from pipeline.serving.client_messages import Done
from pipeline.serving.warm_ring import WarmRing
from storage.errors import UsageError

ROOM = "/reset begins a new conversation, --context gives more room from the start"


class Dialogue:
    """One conversation; `context`: the tokens that it can hold."""

    def __init__(self, ring: WarmRing, template: ChatTemplate, context: int, options: RequestOptions) -> None:
        self.system = ""
        self.last: Done | None = None  # how the last turn ended; None: not by itself, or there was none
        self._ring = ring
        self._template = template
        self._context = context
        self._options = options
        self._turns: list[ChatMessage] = []  # question, answer, question …
        self._numbers = count(1)

    @property
    def messages(self) -> list[ChatMessage]:
        """All of it, the system's message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._turns]

    @property
    def tokens(self) -> int:
        """How many tokens the last turn left in the context."""
        return 0 if self.last is None else self.last.prompt_tokens + self.last.generated_tokens

    def reset(self) -> None:
        """Forget what was said; the system's message stays."""
        self._turns.clear()
        self.last = None

    def instruct(self, system: str) -> None:
        """Change the system's message; empty: none. Raises UsageError where the template refuses one."""
        before, self.system = self.system, system
        try:
            self._template.render([*self.messages, {"role": "user", "content": "?"}])
        except UsageError:
            self.system = before
            raise

    def ask(self, question: str, cancelled: Callable[[], bool] = lambda: False) -> Generator[str, None, None]:
        """Yield the answer's pieces. Once `cancelled` is true, what has come by then is the answer.

        A question without any answer is forgotten. Raises UsageError for one that the template refuses or
        that does not fit the context, and RingError.
        """
        asked: ChatMessage = {"role": "user", "content": question}
        prompt = self._template.render([*self.messages, asked])
        ids = self._ring.revive().encode(prompt, special=False)
        if len(ids) >= self._context:
            raise UsageError(
                f"the context of {self._context:,} tokens is full: with this message the conversation has "
                f"{len(ids):,}; {ROOM}"
            )
        self.last = None
        answer = ""
        try:
            request = submission(next(self._numbers), ids, (), self._options)
            with closing(self._ring.answer(request, cancelled)) as events:
                for event in events:
                    if isinstance(event, Done):
                        self.last = event
                    else:
                        answer += event.text
                        yield event.text
        finally:
            if answer or (self.last is not None and self.last.reason != "cancelled"):
                self._turns += [asked, {"role": "assistant", "content": answer}]

    def cut(self) -> str:
        """Why the last answer ended before its end, as a sentence; empty: it did not, or was cancelled."""
        if self.last is None or self.last.reason != "length":
            return ""
        if self.tokens >= self._context:
            return f"the context of {self._context:,} tokens is full, and the answer was cut; {ROOM}"
        return f"the answer was cut after {self.last.generated_tokens:,} tokens; see --max-new-tokens"

    def figures(self) -> str:
        """What the last turn found, for people; empty: there was none."""
        if self.last is None:
            return ""
        prompt, cached = self.last.prompt_tokens, self.last.cached_tokens
        return (
            f"[context {self.tokens:,} of {self._context:,} tokens; {cached:,} of the prompt's {prompt:,} "
            f"were there already, the others took {self.last.prefill_seconds:.1f} s]"
        )
