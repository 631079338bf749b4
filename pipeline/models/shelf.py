"""The converted stores of this user: which there are, and how one is removed."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import directories
from storage import texts
from storage.codecs import CODECS
from storage.errors import StoreError, UsageError
from storage.manifest import MANIFEST, PREDICTORS
from storage.store import Store

PARTIAL, REMOVING = ".partial", ".removing"  # behind a store's name: unfinished, and about to be gone


@dataclass(frozen=True, slots=True)
class Kept:
    """One directory among the stores."""

    path: Path
    model: str  # empty: what is there cannot be read
    bits: str  # of the FFN's numbers; empty: unknown
    bytes: int
    used: float  # seconds since 1970
    checkpoint: str  # what it was made from; empty: not recorded
    predictors: int  # trained files in it, which no conversion brings back
    state: str  # "whole", "unfinished" or "damaged"

    @property
    def last_used(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.used)

    def to_json(self) -> dict[str, Any]:
        names = ("model", "bits", "bytes", "checkpoint", "predictors", "state")
        found = {name: getattr(self, name) for name in names}
        return {**found, "last_used": self.last_used.isoformat(timespec="seconds"), "path": str(self.path)}


def shelf() -> Path:
    """Where converted stores are kept."""
    return directories.home() / "stores"


def kept() -> list[Kept]:
    """All of them, by model and the latest use. Raises OSError where their directory cannot be read."""
    if not shelf().is_dir():
        return []
    found = [_describe(path) for path in shelf().iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda one: (one.model or one.path.name, -one.used))


def find(name: str) -> Kept:
    """The one of this directory's name, path or, where there is but one of it, model. Raises UsageError."""
    every = kept()
    exact = [one for one in every if name == one.path.name or Path(os.path.abspath(name)) == one.path]
    matching = exact or [one for one in every if name == one.model]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise UsageError(f"there is no converted store {name!r} in {shelf()}; `run.py stores` lists them")
    names = ", ".join(one.path.name for one in matching)
    raise UsageError(f"there are {len(matching)} stores of {name}: {names}")


def remove(store: Kept) -> None:
    """Remove it. Raises UsageError, with who has it, for one that is in use or being written; OSError."""
    with _unwritten(store.path):
        gone = store.path.with_name(store.path.name + REMOVING)
        _refuse_in_use(store.path)
        os.rename(store.path, gone)  # from here on nobody new finds it
        try:
            _refuse_in_use(gone)
        except UsageError:
            os.rename(gone, store.path)
            raise
        shutil.rmtree(gone)


def users(path: Path) -> list[int]:
    """Processes, of those that this user may look at, that have a file of the directory open or mapped."""
    inside = f"{path.resolve()}{os.sep}"
    processes = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return sorted(int(one.name) for one in processes if any(inside in name for name in _opened(one)))


def _opened(process: Path) -> Iterator[str]:
    """Names of what a process has open or mapped; of another user's, or one that has ended, nothing."""
    with contextlib.suppress(OSError):
        yield (process / "maps").read_text(errors="replace")
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                yield os.readlink(link)


def _refuse_in_use(path: Path) -> None:
    if found := users(path):
        numbers = ", ".join(map(str, found))
        raise UsageError(f"{path.name.removesuffix(REMOVING)} is in use by process {numbers}: it stays")


@contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    """Keep conversions from writing this store meanwhile. Raises UsageError where one does."""
    lock = path.with_name(path.name.removesuffix(PARTIAL).removesuffix(REMOVING) + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path.name} is being written by a conversion: it stays") from None
        yield


def _describe(path: Path) -> Kept:
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    total = sum(file.stat().st_size for file in files)
    model, bits, state = "", "", "whole"
    if path.suffix in {PARTIAL, REMOVING} or not (path / MANIFEST).is_file():
        model, state = path.stem.rpartition("-")[0], "unfinished"
    else:
        try:
            store = Store.open(path)
            model, bits = store.manifest.name, _bits(store)
        except StoreError:
            state = "damaged"
    source = path / texts.SOURCE
    used = (source if source.is_file() else path).stat().st_mtime
    predictors = sum(file.parent.name == PREDICTORS for file in files)
    checkpoint = texts.recorded(path).get("checkpoint", "")
    return Kept(path, model, bits, total, used, checkpoint, predictors, state)


def _bits(store: Store) -> str:
    """Of the numbers on flash."""
    codec = CODECS[store.layout.layers[0].unit.rows[0].codec]
    return str(codec.grouped.bits if codec.grouped else 8 * codec.bytes)
