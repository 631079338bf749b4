"""A model's source, and its store: given, or converted from a checkpoint on first use.

Converted stores are kept in `stores` under `directories.home()`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline import directories
from pipeline.console import say
from pipeline.models import builtin
from pipeline.models.hub import download
from storage import texts, tokenizer
from storage.checkpoint import CONFIG, weight_files
from storage.errors import UsageError, reason
from storage.gguf.parts import split
from storage.json_object import read_json
from storage.manifest import MANIFEST
from storage.store import Store
from storage.tokenizer import GENERATION_CONFIG

LONGEST_NAME = 150  # bytes of a model's name in the name of its store
HASHED = 64 << 20  # bytes of a weight file, at most, that is known by its content


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
        if not (path / MANIFEST).is_file():
            self._convert(path)
        elif self.directory is not None:
            self._renew(path, self.directory)
        texts.mark_used(path)
        store = Store.open(path)
        if self.directory == builtin.CHECKPOINT:
            builtin.install(store, self.bits)
        elif self.file == builtin.MIXTURE_FILE:
            builtin.install_mixture(store)
        return store

    def cached_store(self) -> Path:
        """Where the converted store is, or will be."""
        if self.hub_id:
            key = self.hub_id.replace("/", "--")
        else:
            key = f"{_shortened(self.name)}-{_fingerprint(self.checkpoint())}"
        # A GGUF file was once widened to 16 bits unasked: that store must not pass for one of its own bits.
        kept = "own" if self.file is not None else ""
        bits = kept if self.bits is None else "" if self.bits == 16 else f"{self.bits}"
        return directories.home() / "stores" / (f"{key}-{bits}-bits" if bits else key)

    def _convert(self, path: Path) -> None:
        checkpoint, made_from = self.checkpoint(), ""
        if checkpoint.is_dir():  # before the weights, which take long
            made_from = texts.digest(checkpoint)
            texts.require(tokenizer.texts(checkpoint), checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if not (path / MANIFEST).is_file():  # another process may have made it meanwhile
                say(f"converting {self.name} for flash into {path} (once)")
                convert(checkpoint, path, name=self.name, bits=self.bits)
                texts.record(path, self.hub_id or str(checkpoint), made_from)
        if self.directory is not None:
            self._renew(path, self.directory)

    def _renew(self, path: Path, checkpoint: Path) -> None:
        """Bring tokenizer and templates up to date, where the store can be written."""
        try:
            texts.renew(path, checkpoint)
        except OSError as error:
            say(f"{path} keeps the tokenizer that it has: {reason(error)}")


def _shortened(name: str) -> str:
    """As much of a name as leaves room behind it: a file's name has at most 255 bytes."""
    return name.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")


def _fingerprint(checkpoint: Path) -> str:
    """Changes when what a conversion computes from does: configuration, end tokens and weights.

    Notes, logs and the like beside them do not count, nor do texts, which `storage.texts` renews. Weights
    count by content where they are small, so that the built-in model is known whatever its times are; by
    place, size and time where they are too large to hash at every start.
    """
    digest = xxhash.xxh3_64()
    if checkpoint.is_dir():
        generation = checkpoint / GENERATION_CONFIG
        ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
        settings = [read_json(checkpoint / CONFIG), ends]
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for file in weight_files(checkpoint) if checkpoint.is_dir() else split(checkpoint):
        digest.update(file.name.encode())
        status = file.stat()
        if status.st_size <= HASHED:
            digest.update(file.read_bytes())
        else:
            digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def convert(
    checkpoint: Path,
    store: Path,
    *,
    name: str,
    alignment: int = 512,
    order: Path | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    small: bool = False,
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
            small=small,
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
