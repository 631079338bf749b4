"""Streamed text: pieces are whole characters, and their sum is the decoded text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.ring.text import UNDECIDED, Detokenizer

TEXT = "Once upon a time 🐉 a naïve dragon — 龍 — met 👩‍👩‍👧 in Zürich. 🏳️‍🌈 Ende."


def byte_level() -> Tokenizer:
    """A byte-level BPE that knows a few English merges and no whole emoji."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["once upon a time there was a dragon"] * 5, trainer)
    return tokenizer


TOKENIZER = byte_level()


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


def test_an_emoji_split_over_tokens_comes_whole() -> None:
    tokens = TOKENIZER.encode("🐉").ids
    assert len(tokens) == 4
    assert pieces(TOKENIZER, tokens) == ["", "", "", "🐉", ""]


def test_a_character_that_is_never_completed_is_shown_at_the_end() -> None:
    tokens = TOKENIZER.encode("a🐉").ids[:-1]
    assert pieces(TOKENIZER, tokens) == ["a", "", "", "", UNDECIDED]


def test_characters_out_of_byte_tokens_come_whole_one_after_the_other() -> None:
    """Their decoder shows a run of bytes of which the last is no whole character as nothing but U+FFFD."""
    tokenizer = Tokenizer(
        models.WordLevel({f"<0x{byte:02X}>": byte for byte in range(256)}, unk_token="<0x00>")
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert pieces(tokenizer, list("日本".encode())) == ["", "", "日", "", "", "本", ""]


def test_special_tokens_are_not_text() -> None:
    tokens = [TOKENIZER.token_to_id("</s>"), *TOKENIZER.encode("time").ids, TOKENIZER.token_to_id("</s>")]
    assert "".join(pieces(TOKENIZER, tokens)) == "time"


def test_a_decoder_that_drops_the_first_space_drops_no_other() -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces(tokenizer, [0, 1, 0, 1]) == ["a", " b", " a", " b", ""]


WORDS = ["\u2581a", "b", "\u2581", "\u2581\u2581", "##c", "d</w>", "'s", ".", " ", "\u0120e", "</s>"]
PIECES = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
KINDS = {
    "Llama": [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1),
    ],
    "Gemma": PIECES,
    "Metaspace": [decoders.Metaspace()],
    "Metaspace, the first space kept": [decoders.Metaspace(prepend_scheme="never")],
    "WordPiece": [decoders.WordPiece(cleanup=False)],
    "BPE with a mark at the end of words": [decoders.BPEDecoder()],
}


def of_kind(kind: str) -> Tokenizer:
    """A tokenizer of a few words and all bytes with this decoder."""
    names = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="b"))
    tokenizer.decoder = decoders.Sequence(KINDS[kind])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def byte_tokens(text: str) -> list[int]:
    return [len(WORDS) + byte for byte in text.encode()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_add_up_for_every_kind_of_decoder(kind: str, data: st.DataObject) -> None:
    """Spaces at the beginning, at the end and between pieces included."""
    tokenizer = of_kind(kind)
    word = st.integers(0, len(WORDS) - 1).map(lambda number: [number])
    character = st.text(min_size=1, max_size=1).map(byte_tokens)
    drawn = data.draw(st.lists(st.one_of(word, word, character), max_size=20))
    tokens = [token for tokens in drawn for token in tokens]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(st.text(max_size=20))
def test_characters_out_of_byte_tokens_are_never_broken(text: str) -> None:
    found = pieces(of_kind("Gemma"), byte_tokens(text))
    assert "".join(found) == text
    assert UNDECIDED in text or not any(UNDECIDED in piece for piece in found)


SPECIAL = [token.content for token in TOKENIZER.get_added_tokens_decoder().values()]


@given(st.text().filter(lambda text: not any(name in text for name in SPECIAL)))  # those are not text
def test_pieces_of_a_text_are_whole_characters(text: str) -> None:
    found = pieces(TOKENIZER, TOKENIZER.encode(text).ids)
    assert "".join(found) == text
    assert UNDECIDED in text or not any(UNDECIDED in piece for piece in found)


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_pieces_of_any_tokens_add_up(tokens: list[int]) -> None:
    assert "".join(pieces(TOKENIZER, tokens)) == TOKENIZER.decode(tokens)


def test_the_tail_stays_short() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    for token in TOKENIZER.encode(TEXT * 20).ids:
        detokenizer.push(token)
    assert len(detokenizer._tail) < 16
