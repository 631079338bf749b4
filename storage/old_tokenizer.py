"""`tokenizer.json` out of the files that older checkpoints have instead.

- `vocab.json` and `merges.txt`: a byte-level BPE (most of facebook/opt-*, GPT-2, Qwen2).
- `tokenizer.model`: a SentencePiece BPE (Llama 2, Mistral, Gemma). It is a protocol buffer, read here by
  hand: six fields of it are needed, and neither protobuf nor sentencepiece is among the dependencies.

What the vocabulary does not say stands in `tokenizer_config.json` and `added_tokens.json`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import CheckpointError, UnsupportedModel, reason
from storage.json_object import read_json
from storage.vocabulary import WORDS, Pieces, Vocabulary, byte_level, numbered, sentence_pieces

VOCABULARY, MERGES, PIECES = "vocab.json", "merges.txt", "tokenizer.model"
CONFIG, ADDED, MODEL_CONFIG = "tokenizer_config.json", "added_tokens.json", "config.json"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # OPT's, which its files do not list
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
ATTRIBUTES = ("single_word", "lstrip", "rstrip", "normalized")
LARGEST_MODEL = 64 << 20  # bytes of a tokenizer.model; 256,000 pieces need 5 MB

# `tokenizer_class`, without `Fast` -> how it splits words.
CLASSES = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen-2"}


def build(checkpoint: Path) -> str | None:
    """None where there is nothing to build from. Raises CheckpointError, UnsupportedModel."""
    if (checkpoint / VOCABULARY).is_file() and (checkpoint / MERGES).is_file():
        return byte_level_bpe(checkpoint)
    if (checkpoint / PIECES).is_file():
        return sentence_piece_bpe(checkpoint)
    return None


def byte_level_bpe(checkpoint: Path) -> str:
    """Of `vocab.json` and `merges.txt`. OPT begins each text with `</s>`, GPT-2 and Qwen with nothing."""
    from tokenizers import models

    settings = _settings(checkpoint)
    try:
        ids, merges = models.BPE.read_file(str(checkpoint / VOCABULARY), str(checkpoint / MERGES))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{checkpoint / VOCABULARY} and {MERGES} cannot be read: {error}") from error
    opt = settings.model_type in {"", "opt"}
    name = settings.text("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    if name not in CLASSES:
        raise UnsupportedModel(
            f"{checkpoint}: a {name} without tokenizer.json is not supported; supported are "
            f"{', '.join(CLASSES)}"
        )
    words = replace(WORDS[CLASSES[name]], space_first=bool(settings.values.get("add_prefix_space", False)))
    first = settings.named("bos_token") or ("</s>" if opt else None)
    begins = settings.values.get("add_bos_token", opt)
    vocabulary = settings.vocabulary(ids, first if begins else None, SPECIAL if opt else ())
    return byte_level(vocabulary, merges, words)


def sentence_piece_bpe(checkpoint: Path) -> str:
    """Of `tokenizer.model`."""
    path, settings = checkpoint / PIECES, _settings(checkpoint)
    model = read_model(path)
    first = settings.named("bos_token") or model.piece(model.bos)
    begins = settings.values.get("add_bos_token", True)
    special = [token for token, kind in zip(model.pieces, model.kinds, strict=True) if kind == CONTROL]
    whole = [token for token, kind in zip(model.pieces, model.kinds, strict=True) if kind == USER_DEFINED]
    vocabulary = settings.vocabulary(numbered(model.pieces), first if begins else None, special, whole)
    return sentence_pieces(
        replace(vocabulary, unknown=model.piece(model.unknown)),
        Pieces(
            scores=model.scores,
            merged=[kind in {NORMAL, USER_DEFINED} for kind in model.kinds],
            space_first=bool(settings.values.get("add_prefix_space", model.space_first)),
            every_segment=bool(settings.values.get("legacy", False)),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """`tokenizer_config.json`, with the tokens of `added_tokens.json`."""

    values: Mapping[str, Any]
    added: Mapping[str, int]
    model_type: str  # of config.json

    def text(self, key: str, default: str) -> str:
        return str(self.values.get(key) or default)

    def named(self, key: str) -> str | None:
        """A token that the configuration names: a string, or an object around one."""
        return _content(self.values.get(key)) or None

    def vocabulary(
        self,
        ids: Mapping[str, int],
        first: str | None,
        special: Iterator[str] | tuple[str, ...] | list[str],
        whole: list[str] | None = None,
    ) -> Vocabulary:
        """`ids` and what was added to them; a token that is not there is left out."""
        table = self.values.get("added_tokens_decoder")
        entries = list(table.items()) if isinstance(table, dict) else []
        decoder = {_content(entry): (index, entry) for index, entry in entries if isinstance(entry, dict)}
        every = {**ids, **self.added}
        every |= {token: int(index) for token, (index, _) in decoder.items() if str(index).isdecimal()}
        named = [_content(token) for key in NAMED for token in _listed(self.values.get(key))]
        kept = {token for token, (_, entry) in decoder.items() if not entry.get("special", False)}
        specials = [*special, *named, *(token for token in decoder if token not in kept)]
        others = [*(whole or []), *kept, *self.added]
        return Vocabulary(
            every,
            special=[token for token in dict.fromkeys(specials) if token in every],
            whole=[token for token in dict.fromkeys(others) if token in every and token not in specials],
            first=first if first in every else None,
            attributes={
                token: {key: bool(entry[key]) for key in ATTRIBUTES if key in entry}
                for token, (_, entry) in decoder.items()
            },
        )


def _settings(checkpoint: Path) -> _Settings:
    def read(name: str) -> dict[str, Any]:
        return read_json(checkpoint / name) if (checkpoint / name).is_file() else {}

    added = {token: index for token, index in read(ADDED).items() if type(index) is int and index >= 0}
    return _Settings(read(CONFIG), added, str(read(MODEL_CONFIG).get("model_type", "")))


def _content(token: Any) -> str:
    """A token as it is written in `tokenizer_config.json`: a string, or an object around one."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# sentencepiece_model.proto: types of a piece, and the numbers of the fields that are read.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MERGING = 2  # TrainerSpec.model_type: BPE
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _UNKNOWN, _BOS = 3, 40, 41
_CHARACTERS, _DUMMY_PREFIX = 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True)
class PieceModel:
    """What is read of a `tokenizer.model`."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    unknown: int
    bos: int
    space_first: bool

    def piece(self, index: int) -> str | None:
        return self.pieces[index] if 0 <= index < len(self.pieces) else None


def read_model(path: Path) -> PieceModel:
    """Raises CheckpointError for a damaged file, UnsupportedModel for a model that is no BPE."""
    try:
        if path.stat().st_size > LARGEST_MODEL:
            raise CheckpointError(f"{path} cannot be read: it is larger than a vocabulary can be")
        top = list(_fields(path.read_bytes()))
        rows = [dict(_fields(value)) for number, value in top if number == _PIECE]
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in top if number == wanted)))
            for wanted in (_TRAINER, _NORMALIZER)
        )
        pieces = tuple(row[_TEXT].decode() for row in rows)
        scores = tuple(struct.unpack("<f", row.get(_SCORE, bytes(4)))[0] for row in rows)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read: it is no SentencePiece model") from error
    if trainer.get(_MODEL_TYPE, 1) != MERGING or normalizer.get(_CHARACTERS):
        raise UnsupportedModel(
            f"{path}: supported are SentencePiece models of the kind BPE that leave characters as they are"
        )
    return PieceModel(
        pieces,
        scores,
        kinds=tuple(row.get(_KIND, NORMAL) for row in rows),
        unknown=trainer.get(_UNKNOWN, 0),
        bos=trainer.get(_BOS, 1),
        space_first=bool(normalizer.get(_DUMMY_PREFIX, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message. Raises ValueError where it ends too early."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in {_FIXED32, _FIXED64}:
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"a field of the wire type {wire}")
        if length > len(data) - position:
            raise ValueError("a field that ends beyond the message")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number without an end")
