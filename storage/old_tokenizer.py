"""`tokenizer.json` out of the files that older checkpoints have instead.

- `vocab.json` and `merges.txt`: a byte-level BPE (most of facebook/opt-*, GPT-2, Qwen2).
- `tokenizer.model`: a SentencePiece BPE (Llama 2, Mistral, Gemma). It is a protocol buffer, read here by
  hand: six fields of it are needed, and neither protobuf nor sentencepiece is among the dependencies.

What the vocabulary does not say stands beside it (`neighbours.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import CheckpointError, UnsupportedModel, reason
from storage.json_object import read_json, read_whole
from storage.neighbours import Named, content, missing
from storage.vocabulary import WORDS, Pieces, Vocabulary, byte_level, numbered, sentence_pieces

VOCABULARY, MERGES, PIECES = "vocab.json", "merges.txt", "tokenizer.model"
MODEL_CONFIG = "config.json"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # OPT's, where no file lists them
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

    named = Named.read(checkpoint)
    for name in (VOCABULARY, MERGES):
        read_whole(checkpoint / name)  # a pointer is called one
    try:
        ids, merges = models.BPE.read_file(str(checkpoint / VOCABULARY), str(checkpoint / MERGES))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{checkpoint / VOCABULARY} and {MERGES} cannot be read: {error}") from error
    name = str(named.values.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name not in CLASSES:
        raise UnsupportedModel(
            f"{checkpoint}: a {name} without tokenizer.json is not supported; supported are "
            f"{', '.join(CLASSES)}"
        )
    # The published OPT's files say this; copies that have lost them are of OPT all the same.
    lost = not named.values and _model_type(checkpoint) in {"", "opt"}
    words = replace(WORDS[CLASSES[name]], space_first=bool(named.values.get("add_prefix_space", False)))
    special = [token for token in SPECIAL if token in ids] if lost else []
    built = byte_level(Vocabulary(_renamed(ids, named), special=special), merges, words)
    return finished(built, named, begins=lost, first="</s>" if lost else None)


def sentence_piece_bpe(checkpoint: Path) -> str:
    """Of `tokenizer.model`."""
    path, named = checkpoint / PIECES, Named.read(checkpoint)
    model = read_model(path)
    special = [token for token, kind in zip(model.pieces, model.kinds, strict=True) if kind == CONTROL]
    whole = [token for token, kind in zip(model.pieces, model.kinds, strict=True) if kind == USER_DEFINED]
    ids = _renamed(numbered(model.pieces), named)
    built = sentence_pieces(
        Vocabulary(
            ids,
            special=[token for token in special if token in ids],
            whole=[token for token in whole if token in ids],
            unknown=model.piece(model.unknown),
        ),
        Pieces(
            scores=model.scores,
            merged=[kind in {NORMAL, USER_DEFINED} for kind in model.kinds],
            space_first=bool(named.values.get("add_prefix_space", model.space_first)),
            every_segment=bool(named.values.get("legacy", False)),
        ),
    )
    return finished(built, named, begins=True, first=model.piece(model.bos), last=model.piece(model.eos))


def finished(
    built: str, named: Named, *, begins: bool, first: str | None = None, last: str | None = None
) -> str:
    """A tokenizer with the tokens that were added to its vocabulary, and those that begin and end a text.

    `begins`, `first` and `last`: where the files do not say.
    """
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(built)
    tokenizer.add_tokens(missing(tokenizer, named))
    values = named.values
    wanted = {
        "bos": values.get("add_bos_token", begins) and (content(values.get("bos_token")) or first),
        "eos": values.get("add_eos_token", False) and (content(values.get("eos_token")) or last),
    }
    ids = {token: tokenizer.token_to_id(token) for token in wanted.values() if token}
    before, after = (
        token if token and ids[token] is not None else None for token in (wanted["bos"], wanted["eos"])
    )
    if before or after:
        single = [f"{before}:0"] * bool(before) + ["$A:0"] + [f"{after}:0"] * bool(after)
        pair = [part.replace(":0", ":1").replace("$A", "$B") for part in single]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + pair,
            special_tokens=[(token, index) for token, index in ids.items() if token in {before, after}],
        )
    return str(tokenizer.to_str(pretty=False))


def _renamed(ids: Mapping[str, int], named: Named) -> dict[str, int]:
    """The vocabulary, with the names that added tokens give to its unused places."""
    names = {index: token.content for index, token in named.numbered().items()}
    return {
        names[index] if names.get(index, token) not in ids else token: index for token, index in ids.items()
    }


def _model_type(checkpoint: Path) -> str:
    path = checkpoint / MODEL_CONFIG
    return str(read_json(path).get("model_type", "")) if path.is_file() else ""


# sentencepiece_model.proto: types of a piece, and the numbers of the fields that are read.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MERGING = 2  # TrainerSpec.model_type: BPE
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _UNKNOWN, _BOS, _EOS = 3, 40, 41, 42
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
    eos: int
    space_first: bool

    def piece(self, index: int) -> str | None:
        return self.pieces[index] if 0 <= index < len(self.pieces) else None


def read_model(path: Path) -> PieceModel:
    """Raises CheckpointError for a damaged file, UnsupportedModel for a model that is no BPE."""
    try:
        if path.stat().st_size > LARGEST_MODEL:
            raise CheckpointError(f"{path} cannot be read: it is larger than a vocabulary can be")
        top = list(_fields(read_whole(path)))
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
        eos=trainer.get(_EOS, 2),
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
