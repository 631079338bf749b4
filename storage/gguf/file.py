"""A GGUF model, in one file or several, as an `Origin`: what a checkpoint's directory would give.

A split model is named by its first file, `NAME-00001-of-00003.gguf`; the others lie beside it. Its metadata
are the first file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from storage.codecs import CODECS, FLOAT32, Carrier
from storage.errors import CheckpointError, UnsupportedModel
from storage.gguf import settings, tensors, tokenizer
from storage.gguf.basis import File
from storage.gguf.header import Header, Metadata
from storage.gguf.kept import CODEC
from storage.gguf.names import Heads, Restored, restored
from storage.gguf.parts import split
from storage.origin import Entry, samples

SPLIT_COUNT, SPLIT_NUMBER = "split.count", "split.no"


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF model. Matrices are kept in their bits or widened to `dtype`; vectors are float32."""

    path: Path  # of the first file
    config: dict[str, Any]
    shards: tuple[Path, ...]
    digest: str  # of all headers
    dtype: str
    keep: bool
    _tensors: dict[str, Restored]
    _tokenizer: tokenizer.GgufTokenizer

    @classmethod
    def open(cls, path: Path, dtype: str | None = None, keep: bool = False) -> GgufFile:
        """Read every file's header, no weights.

        `dtype`: what matrices are widened to, None for what loses least (`tensors.dtype_of`). With `keep`
        those that have few bits stay as they are (`kept.py`).

        Raises CheckpointError for a file that is missing, truncated or damaged, UnsupportedModel for an
        architecture, an option or a tokenizer that is not supported.
        """
        if not path.is_file():
            raise CheckpointError(f"the GGUF file {path} does not exist")
        shards = split(path)
        headers = [Header.read(shard) for shard in shards]
        metadata = Metadata(shards[0], headers[0].metadata)
        _check_split(shards, headers)
        packed = tuple(tensor for header in headers for tensor in header.tensors)
        file = File.of(metadata, packed)
        config = settings.config(file)
        words = tokenizer.GgufTokenizer(metadata, file.architecture)
        ends = words.end_tokens()
        named = restored(file.architecture, packed, Heads(file.heads, file.kv_heads))
        return cls(
            path=shards[0],
            config={**config, "eos_token_id": ends},
            shards=shards,
            digest="-".join(header.digest for header in headers),
            dtype=dtype or tensors.dtype_of(named.values()),
            keep=keep and any(one.packed.kind in CODEC for one in named.values() if one.matrix),
            _tensors=named,
            _tokenizer=words,
        )

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        return {
            name: Entry(tensor.packed.path, tensor.packed.shape, self._dtype(tensor), 0)
            for name, tensor in self._tensors.items()
        }

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"the GGUF file {self.path} lacks the tensor {name}")
        packed = self._tensors[name].packed
        if shape is not None and entry.shape != shape:
            raise CheckpointError(
                f"{entry.shard}: {packed.name} has the shape {list(entry.shape)} where its metadata ask for "
                f"{list(shape)}"
            )
        if entry.dtype not in CODECS:
            raise UnsupportedModel(
                f"{entry.shard}: {packed.name} has the type {packed.kind}; supported are "
                f"{', '.join(tensors.KINDS)}"
            )
        return entry

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Carrier:
        entry = self.entry(name)
        return tensors.read(self._tensors[name], entry.dtype, start, entry.shape[0] if stop is None else stop)

    def chunks(self, name: str, size: int = 64 << 20) -> Iterator[Carrier]:
        return tensors.chunks(self._tensors[name], self.entry(name).dtype, size)

    def release(self) -> None:
        """Nothing is kept."""

    def generation(self) -> dict[str, Any]:
        return self._tokenizer.generation()

    def texts(self) -> dict[str, bytes]:
        return tokenizer.texts(self._tokenizer)

    def identity(self) -> dict[str, Any]:
        """The headers' hash and, of each file, its size and the hash of samples spread over it."""
        return {
            "gguf": self.digest,
            "dtype": "kept" if self.keep else self.dtype,
            "shards": {shard.name: samples(shard) for shard in self.shards},
        }

    def _dtype(self, tensor: Restored) -> str:
        packed = tensor.packed
        if packed.kind not in tensors.KINDS:
            return packed.kind
        if not tensor.matrix:
            return FLOAT32.name
        codec = CODEC.get(packed.kind)
        if self.keep and codec is not None and len(packed.shape) == 2 and CODECS[codec].fits(packed.columns):
            return codec
        return self.dtype


def _check_split(shards: tuple[Path, ...], headers: list[Header]) -> None:
    """Every file in its place, and no tensor in two."""
    names: set[str] = set()
    for number, (shard, header) in enumerate(zip(shards, headers, strict=True)):
        metadata = Metadata(shard, header.metadata)
        found = metadata.number(SPLIT_COUNT, 1), metadata.number(SPLIT_NUMBER, 0)
        if found not in {(len(shards), number), (0, 0)}:
            raise CheckpointError(
                f"{shard} says that it is file {found[1] + 1} of {found[0]}, not {number + 1} of "
                f"{len(shards)}"
            )
        for tensor in header.tensors:
            if tensor.name in names:
                raise CheckpointError(
                    f"{shard} has the tensor {tensor.name[:80]}, which another file has, too"
                )
            names.add(tensor.name)
