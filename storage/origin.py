"""What a conversion reads: configuration, tensors one at a time, and the files that are neither.

A directory of safetensors or `.bin` files is one (`checkpoint.py`), a GGUF file another (`gguf/file.py`).
Both give the names, shapes and settings that the families know from Hugging Face.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from storage.codecs import Carrier

SAMPLES, SAMPLE_BYTES = 64, 64 << 10  # of each file, for an origin's identity


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `offset` is the byte offset of its data (safetensors only)."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str  # float32 | float16 | bfloat16, or the file's own word for anything else
    offset: int


class Origin(Protocol):
    """An opened checkpoint."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]:
        """Its `config.json`."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The directory of its tensors."""

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        """Raises CheckpointError for a missing tensor or another shape, UnsupportedModel for its dtype."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        """The tensor, or its lines from `start` up to `stop`: of a stack of matrices, through all of them."""

    def chunks(self, name: str, size: int = 64 << 20) -> Iterator[Carrier]:
        """The tensor's elements, flat, in chunks of at most `size` bytes."""

    def release(self) -> None:
        """Drop what reading keeps in memory."""

    def generation(self) -> dict[str, Any]:
        """Its `generation_config.json`, or nothing."""

    def texts(self) -> dict[str, bytes]:
        """The files that a store takes over by name: tokenizer, chat template, generation settings."""

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another: JSON, independent of paths and times."""


def samples(shard: Path) -> dict[str, Any]:
    """A file's size and the hash of 64 samples of 64 KiB spread over it.

    Reading everything would take minutes; two trainings of one shape differ everywhere.
    """
    digest, size = xxhash.xxh3_128(), shard.stat().st_size
    last = max(size - SAMPLE_BYTES, 0)
    with shard.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(last * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "samples": digest.hexdigest()}
