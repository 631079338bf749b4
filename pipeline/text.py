"""Text out of tokens, one token at a time, never splitting a character.

A byte-level token may hold a part of a UTF-8 character. Decoding a growing list of tokens shows
U+FFFD in place of what is not complete yet; such an ending is held back until it is.
"""

from __future__ import annotations

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what decoding shows for bytes that are no character (yet)
HELD_TOKENS = 8  # a character has at most four bytes; longer than this, the bytes really are wrong


class Detokenizer:
    """Turns tokens into pieces of text whose sum is the decoded text.

    Only a short tail of tokens is decoded for each new one, so the cost of a token does not grow
    with the text. The tail's first part, already shown, stays in it: decoders may treat the first
    token of a text differently (a leading space), and so the difference of two decodings that
    begin at the same token is what the new token adds.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # the tail begins here
        self._shown = 0  # tokens before this one are in pieces already returned

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._tokens.append(token)
        before, after = self._decodings()
        held = len(self._tokens) - self._shown
        if after.endswith(UNFINISHED) and held < HELD_TOKENS:
            return ""
        return self._advance(before, after)

    def finish(self) -> str:
        """What is still held back, with U+FFFD for bytes that never became a character."""
        return self._advance(*self._decodings())

    def _decodings(self) -> tuple[str, str]:
        tail = self._tokens[self._start :]
        before = self._tokenizer.decode(tail[: self._shown - self._start], skip_special_tokens=True)
        return before, self._tokenizer.decode(tail, skip_special_tokens=True)

    def _advance(self, before: str, after: str) -> str:
        self._start = self._shown
        self._shown = len(self._tokens)
        del self._tokens[: self._start]
        self._shown -= self._start
        self._start = 0
        return after[len(before) :]
