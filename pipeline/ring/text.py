"""Text out of tokens, one token at a time, never splitting a character.

A token may hold a part of a UTF-8 character. Decoding shows what is incomplete at the end of the bytes as
U+FFFD: a byte-level tokenizer the character, SentencePiece's byte tokens every byte of their run, also those
of whole characters before it. All of it is held back until the next tokens have decided what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenizers import Tokenizer

EMPTY: Final[Mapping[int, str]] = MappingProxyType({})
UNDECIDED = "\ufffd"  # at the end of a decoded text: bytes that are no character, or not yet one


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One that a tokenizer knows beside its vocabulary proper, whole wherever its text stands."""

    number: int
    hidden: bool  # special: no part of a text


def added_tokens(tokenizer: Tokenizer) -> dict[str, AddedToken]:
    """By their texts."""
    return {
        token.content: AddedToken(number, token.special)
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }


class Detokenizer:
    """Turns tokens into pieces of text; the pieces' sum is the text of all tokens.

    Only a tail of the tokens is decoded for each new one, so that a token's cost does not grow with
    the text. The tail begins with tokens already shown, because decoders may treat the first token of
    a text differently (its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str] = EMPTY) -> None:
        """`marks`: special tokens that are text in this one, each with its text."""
        self._tokenizer = tokenizer
        self._marks = marks
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self._tail: list[int] = []  # begins and, but for what is held back, ends between characters
        self._context = 0  # tokens of the tail that were whole characters before the last piece
        self._shown = 0  # characters of the tail's text that are in pieces already

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        if token in self._marks:
            return self.finish() + self._marks[token]
        if token in self._special:  # no text, nor what another's depends on
            return ""
        self._tail.append(token)
        text = self._decode()
        decided = text.rstrip(UNDECIDED)
        piece = decided[self._shown :]
        self._shown = max(self._shown, len(decided))
        if decided == text:
            del self._tail[: self._context]
            self._context = len(self._tail)
            self._shown = len(self._decode())
        return piece

    def finish(self) -> str:
        """What is still held back: U+FFFD for bytes that never became a character."""
        piece = self._decode()[self._shown :]
        self._tail.clear()
        self._context = self._shown = 0
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tail, skip_special_tokens=True)
