"""The files of one GGUF model: one, or several that are numbered in their names."""

from __future__ import annotations

import re
from pathlib import Path

from storage.errors import CheckpointError

SUFFIX = ".gguf"
SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Whether the name is a GGUF file's, there or not."""
    return path.suffix == SUFFIX and not path.is_dir()


def split(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is, or is a part of. Raises CheckpointError for a missing one."""
    parts = SPLIT.fullmatch(path.name)
    if parts is None:
        return (path,)
    count = int(parts["count"])
    shards = tuple(
        path.with_name(f"{parts['stem']}-{number:05d}-of-{count:05d}{SUFFIX}")
        for number in range(1, count + 1)
    )
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"the GGUF file {shard}, one of {count} of its model, is missing")
    if path not in shards:
        raise CheckpointError(f"{path} is numbered beyond the {count} files of its model")
    return shards
