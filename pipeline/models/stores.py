"""A model's source, and its store: given, or converted from a checkpoint on first use.

Converted stores are kept in `stores` under `directories.home()`.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline import directories
from pipeline.console import say
from pipeline.models import builtin
from pipeline.models.hub import download
from storage.errors import UsageError
from storage.gguf.parts import is_gguf, split
from storage.manifest import MANIFEST
from storage.store import Store

FINGERPRINTED = {".json", ".jinja", ".safetensors", ".bin", ".txt", ".model"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: exactly one of store, directory, file and hub id is set."""

    name: str  # for people
    store: Path | None = None
    directory: Path | None = None  # of a checkpoint
    file: Path | None = None  # GGUF; of a split model the first
    hub_id: str = ""
    bits: int | None = None  # of the converted store; None: the checkpoint's own

    def checkpoint(self) -> Path:
        """The checkpoint's directory, downloaded if need be, or the GGUF file."""
        given = self.directory or self.file
        if given is not None:
            return given
        if self.hub_id:
            return download(self.hub_id)
        raise UsageError(f"{self.store} is a store already")

    def open_store(self) -> Store:
        """The store, converted on first use. Later calls open it at once, without the network."""
        if self.store is not None:
            if self.bits is not None:
                raise UsageError(
                    f"{self.store} is a store already: its bits were chosen when it was converted"
                )
            return Store.open(self.store)
        path = self.cached_store()
        store = Store.open(path) if (path / MANIFEST).is_file() else self._convert(path)
        if self.directory == builtin.CHECKPOINT:
            builtin.install(store, self.bits)
        return store

    def cached_store(self) -> Path:
        """Where the converted store is, or will be."""
        if self.hub_id:
            key = self.hub_id.replace("/", "--")
        else:
            key = f"{self.name}-{_fingerprint(self.checkpoint())}"
        # A GGUF file was once widened to 16 bits unasked: that store must not pass for one of its own bits.
        kept = "own" if self.file is not None else ""
        bits = kept if self.bits is None else "" if self.bits == 16 else f"{self.bits}"
        return directories.home() / "stores" / (f"{key}-{bits}-bits" if bits else key)

    def _convert(self, path: Path) -> Store:
        checkpoint = self.checkpoint()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if not (path / MANIFEST).is_file():  # another process may have made it meanwhile
                say(f"converting {self.name} for flash into {path} (once)")
                convert(checkpoint, path, name=self.name, bits=self.bits)
        return Store.open(path)


def _fingerprint(checkpoint: Path) -> str:
    """Changes when the checkpoint does: a directory's files, or a GGUF model's.

    By content for small files, so that the built-in model is known whatever its times are; by
    place, size and time for shards, which are too large to hash at every start.
    """
    digest = xxhash.xxh3_64()
    for file in _files(checkpoint):
        digest.update(file.name.encode())
        status = file.stat()
        if status.st_size <= 64 << 20:
            digest.update(file.read_bytes())
        else:
            digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files(checkpoint: Path) -> list[Path]:
    if is_gguf(checkpoint):
        return list(split(checkpoint))
    return [
        file
        for file in sorted(checkpoint.iterdir())
        if file.suffix in FINGERPRINTED and file.name != builtin.PREDICTORS
    ]


def convert(
    checkpoint: Path,
    store: Path,
    *,
    name: str,
    alignment: int = 512,
    order: Path | None = None,
    dtype: str | None = None,
    bits: int | None = None,
) -> None:
    """Convert with a progress bar; `order`: a `.npy` of neurons by position; `dtype`: of a GGUF file only."""
    from pipeline.progress import Progress
    from storage.convert import convert as convert_checkpoint
    from storage.convert import read_order

    neurons = read_order(order) if order else None

    with Progress(f"converting {name}") as progress:
        convert_checkpoint(
            checkpoint,
            store,
            name=name,
            alignment=alignment,
            order=neurons,
            dtype=dtype,
            bits=bits,
            progress=progress,
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One conversion at a time; the lock goes with the process that holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that converts the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
