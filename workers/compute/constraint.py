"""Which tokens may come next, for an answer that must follow a grammar.

The library `llguidance` keeps a parser of the grammar and a tree of the tokenizer's tokens as bytes, so that
every kind of tokenizer is one to it. It is imported, and the tree is built, when the first grammar comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.ring.grammar import first_sentence
from storage.store import Store
from storage.tokenizer import TOKENIZER

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WORD = 32  # tokens in one number of the library's mask


class Unfollowable(Exception):
    """The answer cannot go on by its grammar; one sentence."""


class Constraint:
    """One answer's way through its grammar."""

    def __init__(self, matcher: LLMatcher, end_tokens: Sequence[int], tokens: int, vocabulary: int) -> None:
        """`tokens`: how many the tokenizer has; `vocabulary`: how many the model has logits of."""
        self._matcher = matcher
        self._end_tokens = np.array(end_tokens)
        self._bits = np.zeros(-(-tokens // WORD), dtype=np.uint32)
        self._count = min(tokens, vocabulary)
        self._check()

    def allowed(self) -> npt.NDArray[np.intp]:
        """The ids that may come next, ascending; at least one. Raises Unfollowable."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._count)
        ids = np.flatnonzero(bits)
        if not self._matcher.is_accepting():  # to the library some end tokens are text as well
            ids = ids[~np.isin(ids, self._end_tokens)]
        if not ids.size:
            raise Unfollowable("no token of the model continues an answer of this form")
        return ids

    def take(self, token: int) -> bool:
        """Go on by a token that was allowed; whether the answer is whole now. Raises Unfollowable."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise Unfollowable(f"the answer's form is too much to follow: {_problem(self._matcher)}")


class Constraints:
    """Makes the constraints of one store's model."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tokenizer: LLTokenizer | None = None

    def of(self, grammar: str, end_tokens: Sequence[int]) -> Constraint:
        """`end_tokens`: what ends an answer. Raises Unfollowable."""
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._open(end_tokens)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        vocabulary = self._store.architecture.vocabulary
        return Constraint(matcher, end_tokens, self._tokenizer.vocab_size, vocabulary)

    def _open(self, end_tokens: Sequence[int]) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = (self._store.path / TOKENIZER).read_text(encoding="utf-8")
        try:
            return LLTokenizer(text, eos_token=list(end_tokens))
        except Exception as error:  # the library raises nothing narrower
            why = first_sentence(str(error))
            raise Unfollowable(
                f"this model's tokenizer does not go with answers of a given form: {why}"
            ) from error


def _problem(matcher: LLMatcher) -> str:
    return first_sentence(matcher.get_error())
