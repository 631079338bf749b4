"""A checkpoint's tokenizer on its way into a store, and out of it.

What a checkpoint has is taken over as it is, `tokenizer.json` with what stands beside it (`neighbours.py`).
It is built where only older files are there (`old_tokenizer.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import StoreCorrupt, StoreError
from storage.json_object import read_whole
from storage.store import Store
from storage.sums import check_small

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
LONGEST_TEMPLATE_NAME = 100  # characters, with the ending
MORE_TEMPLATES = "additional_chat_templates"  # a directory of a checkpoint: templates by their names
# What a tokenizer may be made from, too.
OTHERS = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")


def load_tokenizer(store: Store) -> Tokenizer:
    """The store's tokenizer. Raises StoreError when it has none, StoreCorrupt for a text that was changed."""
    from tokenizers import Tokenizer

    path = store.path / TOKENIZER
    if not path.is_file():
        raise StoreError(
            f"the store {store.path} has no {TOKENIZER}; convert a checkpoint that has a tokenizer"
        )
    check_texts(store)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise StoreError(f"{path} is damaged: {error}") from error
    tokenizer.no_padding()  # a store of an earlier version may have them
    tokenizer.no_truncation()
    return tokenizer


def check_texts(store: Store) -> None:
    """Compare tokenizer, templates and the like with their hashes. Raises StoreCorrupt.

    Another process may have renewed them since the store was opened: then the manifest is new, too.
    """
    names = [name for name in store.manifest.files if is_text(name)]
    try:
        for name in names:
            check_small(store, name)
    except StoreCorrupt:
        renewed = Store.open(store.path)
        for name in filter(is_text, renewed.manifest.files):
            check_small(renewed, name)


def texts(checkpoint: Path) -> dict[str, bytes]:
    """The files that a store takes over by name, `tokenizer.json` built where it can be.

    Raises CheckpointError for what cannot be read, UnsupportedModel for a vocabulary of another kind.
    """
    found = {name: read_whole(checkpoint / name) for name in COPIED if (checkpoint / name).is_file()}
    found |= {template_file(path.stem): read_whole(path) for path in _templates(checkpoint)}
    if TOKENIZER in found:
        from storage import neighbours

        found[TOKENIZER] = neighbours.completed(found[TOKENIZER], checkpoint)
    else:
        from storage import old_tokenizer

        built = old_tokenizer.build(checkpoint)
        if built is not None:
            found[TOKENIZER] = built.encode()
    return found


def sources(checkpoint: Path) -> list[Path]:
    """The files that `texts` reads, as far as they are there."""
    named = [path for name in (*COPIED, *OTHERS) if (path := checkpoint / name).is_file()]
    return [*named, *_templates(checkpoint)]


def is_text(name: str) -> bool:
    """Whether a store's file of this name is one that `texts` gives."""
    return name in COPIED or (name.startswith("chat_template.") and name.endswith(".jinja"))


def template_file(name: str) -> str:
    """The file of a store that has the chat template of this name."""
    return f"chat_template.{name}.jinja"


def _templates(checkpoint: Path) -> list[Path]:
    found = sorted((checkpoint / MORE_TEMPLATES).glob("*.jinja"))
    return [path for path in found if path.is_file() and len(path.name) <= LONGEST_TEMPLATE_NAME]


def copy(checkpoint: Path, directory: Path) -> tuple[str, ...]:
    """Write those files; returns their names. Raises as `texts` does, and OSError."""
    found = texts(checkpoint)
    for name, data in found.items():
        (directory / name).write_bytes(data)
    return tuple(found)
