"""A store's texts: tokenizer, chat template and generation settings, which may change without the weights.

`source.json` in a store says from which files they were made, so that a repaired tokenizer or a new chat
template reaches a store that is there already. Its time is that of the store's last use.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import xxhash

from storage import tokenizer
from storage.errors import CheckpointError
from storage.files import write_whole
from storage.manifest import MANIFEST, SEAL, FileEntry, seal

SOURCE = "source.json"


def renew(store: Path, checkpoint: Path) -> bool:
    """Give a store the texts of its checkpoint's directory, where they have changed; whether they had.

    A renewal that was killed is done again. Raises CheckpointError or UnsupportedModel for the new texts, and
    OSError.
    """
    now = digest(checkpoint)
    if recorded(store).get("texts") == now:
        return False
    found = tokenizer.texts(checkpoint)
    require(found, checkpoint)
    try:
        data = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
        listed = dict(data["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # whoever opens it says what is wrong
    gone = [name for name in listed if tokenizer.is_text(name) and name not in found]
    files = {name: entry for name, entry in listed.items() if not tokenizer.is_text(name)}
    for name, text in found.items():
        write_whole(store / name, text, shared=True)
        files[name] = asdict(FileEntry(len(text), xxhash.xxh3_128_hexdigest(text)))
    renewed = {**data, "files": files}
    if SEAL in data:
        renewed[SEAL] = seal(renewed)
    write_whole(store / MANIFEST, json.dumps(renewed, indent=2).encode(), shared=True)
    for name in gone:
        (store / name).unlink(missing_ok=True)
    record(store, str(checkpoint), now)
    return True


def require(found: dict[str, bytes], checkpoint: Path) -> None:
    """Raises CheckpointError for texts without a tokenizer."""
    if tokenizer.TOKENIZER not in found:
        raise CheckpointError(
            f"{checkpoint} has no tokenizer: neither {tokenizer.TOKENIZER}, nor vocab.json and merges.txt, "
            "nor tokenizer.model"
        )


def recorded(store: Path) -> dict[str, str]:
    """What `record` wrote; nothing for a store that was made by another way, or before it was kept."""
    try:
        data = json.loads((store / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in data.items()} if isinstance(data, dict) else {}


def record(store: Path, checkpoint: str, texts: str = "") -> None:
    """Keep where a store is from; `texts`: the digest of what its texts were made from. Raises OSError."""
    write_whole(store / SOURCE, json.dumps({"checkpoint": checkpoint, "texts": texts}).encode(), shared=True)


def mark_used(store: Path) -> None:
    """Keep when a store was last used, where it can be written."""
    with contextlib.suppress(OSError):
        os.utime(store / SOURCE)


def digest(checkpoint: Path) -> str:
    """Of the files that a checkpoint's texts are made from. Raises OSError."""
    every = xxhash.xxh3_64()
    for file in tokenizer.sources(checkpoint):
        data = file.read_bytes()
        every.update(f"{file.name}\0{len(data)}\0".encode())
        every.update(data)
    return every.hexdigest()
