"""A checkpoint's tokenizer on its way into a store, and out of it.

What a checkpoint has is taken over as it is, `tokenizer.json` with what stands beside it (`neighbours.py`).
It is built where only older files are there (`old_tokenizer.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import StoreError
from storage.json_object import read_whole
from storage.store import Store

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
COPIED = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
)


def load_tokenizer(store: Store) -> Tokenizer:
    """The store's tokenizer. Raises StoreError when it has none, or a damaged one."""
    from tokenizers import Tokenizer

    path = store.path / TOKENIZER
    if not path.is_file():
        raise StoreError(
            f"the store {store.path} has no {TOKENIZER}; convert a checkpoint that has a tokenizer"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise StoreError(f"{path} is damaged: {error}") from error
    tokenizer.no_padding()  # a store of an earlier version may have them
    tokenizer.no_truncation()
    return tokenizer


def texts(checkpoint: Path) -> dict[str, bytes]:
    """The files that a store takes over by name, `tokenizer.json` built where it can be.

    Raises CheckpointError for what cannot be read, UnsupportedModel for a vocabulary of another kind.
    """
    found = {name: read_whole(checkpoint / name) for name in COPIED if (checkpoint / name).is_file()}
    if TOKENIZER in found:
        from storage import neighbours

        found[TOKENIZER] = neighbours.completed(found[TOKENIZER], checkpoint)
    else:
        from storage import old_tokenizer

        built = old_tokenizer.build(checkpoint)
        if built is not None:
            found[TOKENIZER] = built.encode()
    return found


def copy(checkpoint: Path, directory: Path) -> tuple[str, ...]:
    """Write those files; returns their names. Raises as `texts` does, and OSError."""
    found = texts(checkpoint)
    for name, data in found.items():
        (directory / name).write_bytes(data)
    return tuple(found)
