"""A tokenizer out of its vocabulary, as the `tokenizer.json` that the library `tokenizers` reads.

Two kinds cover the published models: byte-level BPE (GPT-2's alphabet of 256 characters for the bytes, a list
of merges, a way to split text into words), and SentencePiece's BPE (pieces with scores, U+2581 for a space,
byte pieces for what has no piece). GGUF files and the old files of a checkpoint both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from storage.errors import CheckpointError

SPACE = "\u2581"
LONGEST_PIECE = 256  # characters; deriving merges takes their square

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    """Words end where a capital follows a small letter."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}"
    return f"{words}|{digits}{_CASED_REST}"


def _plain(digits: str) -> str:
    return rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"


@dataclass(frozen=True, slots=True)
class Words:
    """How a byte-level tokenizer cuts text into the words within which it merges."""

    regex: str = ""  # empty: GPT-2's, after `digits` and `falcon`
    space_first: bool = False  # a space goes before a text
    digits: bool = False  # each digit apart
    falcon: bool = False  # punctuation apart, digits in threes
    composed: bool = False  # text is normalised to NFC first
    whole_words: bool = False  # a word that is a token is not merged


WORDS: dict[str, Words] = {
    "gpt-2": Words(),
    "digits": Words(digits=True),
    "llama-3": Words(_plain(r"\p{N}{1,3}"), whole_words=True),
    "dbrx": Words(_plain(r"\p{N}{1,3}")),
    "qwen-2": Words(_plain(r"\p{N}"), composed=True),
    "tekken": Words(_cased("", r"\p{N}"), whole_words=True),
    "gpt-4o": Words(_cased(f"{_CONTRACTED}?", r"\p{N}{1,3}")),
    "falcon": Words(falcon=True),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and their ids, and what some of them are."""

    ids: Mapping[str, int]
    special: Sequence[str] = ()  # never part of a text
    whole: Sequence[str] = ()  # part of a text, and never cut
    first: str | None = None  # put before every text
    unknown: str | None = None


def numbered(tokens: Sequence[str]) -> dict[str, int]:
    """Tokens in the order of their ids. Raises CheckpointError for one that is there twice."""
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if ids.setdefault(token, index) != index:
            raise CheckpointError(f"the vocabulary has the token {token[:80]!r} twice")
    return ids


def byte_level(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], words: Words) -> str:
    """`tokenizer.json` of a byte-level BPE. Raises CheckpointError for merges of unknown tokens."""
    model = _model(
        lambda: models.BPE(vocab=dict(vocabulary.ids), merges=list(merges), ignore_merges=words.whole_words)
    )
    tokenizer = Tokenizer(model)
    if words.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splitters(words))
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, vocabulary)


def _splitters(words: Words) -> list[pre_tokenizers.PreTokenizer]:
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=words.space_first, use_regex=not words.regex)
    if words.regex:
        return [pre_tokenizers.Split(Regex(words.regex), behavior="isolated"), bytes_of_words]
    if words.falcon:
        return [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            bytes_of_words,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    return [*([pre_tokenizers.Digits(individual_digits=True)] if words.digits else []), bytes_of_words]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What else a SentencePiece model says."""

    scores: Sequence[float]  # by id; higher merges first
    merged: Sequence[bool]  # by id: whether text can become this piece: not so control and byte pieces
    space_first: bool  # a space goes before a text …
    every_segment: bool = False  # … and after each special token within it


def sentence_pieces(vocabulary: Vocabulary, pieces: Pieces) -> str:
    """`tokenizer.json` of a SentencePiece BPE; its merges are those that make one piece of two."""
    merges = derived_merges(vocabulary.ids, pieces)
    model = _model(
        lambda: models.BPE(
            vocab=dict(vocabulary.ids),
            merges=merges,
            unk_token=vocabulary.unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    if pieces.space_first and pieces.every_segment:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    elif pieces.space_first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if pieces.space_first else steps
    )
    return _finished(tokenizer, vocabulary)


def derived_merges(vocabulary: Mapping[str, int], pieces: Pieces) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first.

    By the score of what is made, then the longer left part, then the longer right one; then as the
    vocabulary has them. It is how transformers derives them.
    """
    ids = {token: index for token, index in vocabulary.items() if pieces.merged[index]}
    if max(map(len, ids), default=0) > LONGEST_PIECE:
        raise CheckpointError(f"the vocabulary has a piece of more than {LONGEST_PIECE} characters")
    found = [
        (-pieces.scores[index], -cut, cut - len(token), index, token[:cut], token[cut:])
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _model(make: Callable[[], models.Model]) -> models.Model:
    try:
        return make()
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"the tokenizer's merges do not fit its vocabulary: {error}") from error


def _finished(tokenizer: Tokenizer, vocabulary: Vocabulary) -> str:
    for tokens, special in ((vocabulary.special, True), (vocabulary.whole, False)):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    first = vocabulary.first
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0",
            pair=f"{first}:0 $A:0 {first}:1 $B:1",
            special_tokens=[(first, vocabulary.ids[first])],
        )
    return str(tokenizer.to_str(pretty=False))
