"""Text files as rows of tokens: plain text or JSON lines with "text", either xz-compressed."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from storage.errors import StoreError, UsageError, reason
from storage.store import Store
from storage.tokenizer import TOKENIZER, load_tokenizer

LONGEST_ROW = 512  # tokens
FEWEST_ROWS = 4  # of few tokens: to train on, to calibrate with and to report on
PLAIN_CHARACTERS = 1 << 16  # of plain text tokenised at once


def rows(
    path: Path, store: Store, tokens: int, skip: int = 0, longest: int = LONGEST_ROW
) -> npt.NDArray[np.int64]:
    """At most `tokens` of the file behind its first `skip`, `[rows, length]`, documents in their order.

    A row has `longest` tokens, where the model takes and the text has so many.

    Raises UsageError for a file that cannot be read or has too little text for one row, StoreError for a
    tokenizer that is not the model's.
    """
    length = min(longest, store.architecture.max_positions, tokens)
    tokenizer, ids = load_tokenizer(store), list[int]()
    try:
        for document in documents(path):
            ids += tokenizer.encode(document).ids
            if len(ids) >= skip + tokens:
                break
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UsageError(f"{path} cannot be read as text: {reason(error)}") from error
    del ids[:skip]
    count = min(len(ids), tokens) // length
    if not count:
        behind = f" behind the first {skip:,}" if skip else ""
        raise UsageError(
            f"{path} has {len(ids)} tokens{behind}, too few for a row of {length}: "
            "give a longer text, or fewer --tokens"
        )
    if max(ids) >= store.architecture.vocabulary:
        raise StoreError(f"{store.path / TOKENIZER} has tokens that are none of the model's")
    return np.array(ids[: count * length], np.int64).reshape(count, length)


def two(
    text: Path, held_out: Path | None, store: Store, tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of a text to train on, and a sixteenth as many of a held-out one (none without it)."""
    longest = min(LONGEST_ROW, max(1, tokens // FEWEST_ROWS))
    first = rows(text, store, tokens, longest=longest)
    length = first.shape[1]
    more = rows(held_out, store, max(first.size // 16, length), longest=length) if held_out else first[:0]
    return first, more


def documents(path: Path) -> Iterator[str]:
    """One after the other, reading no further than asked. Raises UsageError for a line without text."""
    plain = path.suffix != ".xz"
    name = path.name if plain else path.name.removesuffix(".xz")
    with path.open(encoding="utf-8") if plain else lzma.open(path, "rt", encoding="utf-8") as file:
        if not name.endswith(".jsonl"):
            yield from _pieces(file)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text(line, path, number)


def _pieces(file: IO[str]) -> Iterator[str]:
    """Plain text in pieces of whole lines."""
    while lines := file.readlines(PLAIN_CHARACTERS):
        yield "".join(lines)


def _text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UsageError(f'{path}, line {number}, is not a JSON object with a "text"')
    return text
