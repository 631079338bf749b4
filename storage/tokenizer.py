"""The checkpoint's tokenizer: copied into the store, or built from `vocab.json` and `merges.txt`, and loaded.

Most of facebook/opt-* ship only the two old files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.checkpoint import GENERATION_CONFIG, read_json
from storage.errors import CheckpointError, StoreError
from storage.store import Store

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
VOCABULARY, MERGES, TOKENIZER_CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
COPIED = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def load_tokenizer(store: Store) -> Tokenizer:
    """The store's tokenizer. Raises StoreError when it has none, or a damaged one."""
    from tokenizers import Tokenizer

    path = store.path / TOKENIZER
    if not path.is_file():
        raise StoreError(
            f"the store {store.path} has no {TOKENIZER}; convert a checkpoint that has a tokenizer"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise StoreError(f"{path} is damaged: {error}") from error


def copy(checkpoint: Path, store: Path) -> tuple[str, ...]:
    """Copy what is there, build `tokenizer.json` where it can be; the names of the files written.

    Raises CheckpointError for a vocabulary that cannot be read, OSError for what cannot be written.
    """
    written = [name for name in COPIED if (checkpoint / name).is_file()]
    for name in written:
        shutil.copyfile(checkpoint / name, store / name)
    if TOKENIZER not in written and (checkpoint / VOCABULARY).is_file() and (checkpoint / MERGES).is_file():
        (store / TOKENIZER).write_text(byte_level_bpe(checkpoint), encoding="utf-8")
        written.append(TOKENIZER)
    return tuple(written)


def byte_level_bpe(checkpoint: Path) -> str:
    """`tokenizer.json` for GPT-2's byte-level BPE, with OPT's leading `</s>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    settings = _settings(checkpoint)
    try:
        model = models.BPE.from_file(str(checkpoint / VOCABULARY), str(checkpoint / MERGES))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{checkpoint / VOCABULARY} and {MERGES} cannot be read: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space", False))
    )
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = json.loads((checkpoint / VOCABULARY).read_text(encoding="utf-8"))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL if token in vocabulary]
    )
    first = _content(settings.get("bos_token", "</s>"))
    if settings.get("add_bos_token", True) and first in vocabulary:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0",
            pair=f"{first}:0 $A:0 {first}:1 $B:1",
            special_tokens=[(first, vocabulary[first])],
        )
    return str(tokenizer.to_str(pretty=False))


def _settings(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / TOKENIZER_CONFIG
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """A token as it is written in `tokenizer_config.json`: a string, or an object around one."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
